"""`GET /v1/models`: the served model under its names."""

from __future__ import annotations

import dataclasses

from pyllm.server.api.fields import ErrorAnswer
from pyllm.server.api.models import ModelCard, ModelList
from pyllm.server.chat.served_model import model_names


def test_models_are_listed_and_found_by_names_with_slashes(harness):
    models = ModelList.model_validate_json(harness.get("/v1/models").content)
    assert [model.id for model in models.data] == ["org/tiny", "alias"]
    card = ModelCard.model_validate_json(harness.get("/v1/models/org/tiny").content)
    assert card.max_model_len == harness.engine.info.config.max_model_len
    for response in (harness.get("/v1/models/org/other"), harness.chat(model="other"), harness.complete(model="x")):
        assert response.status_code == 404
        assert ErrorAnswer.model_validate_json(response.content).error.code == "model_not_found"


def test_patterns_add_names_that_are_not_listed(harness):
    harness.service.model = dataclasses.replace(harness.model, patterns=("gpt-*",))
    assert harness.chat(model="gpt-4o").json()["model"] == "gpt-4o"
    for name in ("dummy", "unknown"):
        assert harness.chat(model=name).json()["model"] == harness.chat().json()["model"] == "org/tiny"
    assert [card["id"] for card in harness.get("/v1/models").json()["data"]] == ["org/tiny", "alias"]
    assert harness.get("/v1/models/gpt-4o").json()["id"] == "gpt-4o"
    assert harness.chat(model="GPT-4o").status_code == 404


def test_default_names_are_the_model_as_given_and_its_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "mine").mkdir(parents=True)
    assert model_names("org/other") == ("org/other", "other")
    assert model_names("org/mine") == ("mine", "org/mine")
    assert model_names("./org/mine/") == model_names(str(tmp_path / "org" / "mine")) == ("mine",)
    assert model_names(None) == ("pyllm-demo",)
