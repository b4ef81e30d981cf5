"""`GET /v1/models`: the served model under its names."""

from __future__ import annotations

from pyllm.server.api.fields import ErrorAnswer
from pyllm.server.api.models import ModelCard, ModelList


def test_models_are_listed_and_found_by_names_with_slashes(harness):
    models = ModelList.model_validate_json(harness.get("/v1/models").content)
    assert [model.id for model in models.data] == ["org/tiny", "alias"]
    card = ModelCard.model_validate_json(harness.get("/v1/models/org/tiny").content)
    assert card.max_model_len == harness.engine.info.config.max_model_len
    for response in (harness.get("/v1/models/org/other"), harness.chat(model="other"), harness.complete(model="x")):
        assert response.status_code == 404
        assert ErrorAnswer.model_validate_json(response.content).error.code == "model_not_found"
