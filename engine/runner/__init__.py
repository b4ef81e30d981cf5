"""The tensors of one step: inputs, the forward pass, sampling."""
