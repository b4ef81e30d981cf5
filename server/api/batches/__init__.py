"""Files and batches: many requests in one file, answered while no other request needs the engine."""
