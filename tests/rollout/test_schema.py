"""Replies by a schema: what random weights say, against the package that validates JSON by schemas."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

from model.tokenizer import build_byte_tokenizer
from rl.errors import DataError
from rollout.engine import Finish
from rollout.schema import SchemaReader
from rollout.torch_engine import TorchEngine

SCORE = {"type": "integer", "minimum": 0, "maximum": 12}
SCHEMA = {
    "type": "object",
    "properties": {
        "ballot": {"const": '0f"ß'},
        "reasons": {"type": "string", "maxLength": 9},
        "choices": {"type": "object", "properties": {"bcd": {"enum": ["bcd", "neither"]}, "fgh": {"enum": [0, 0.5]}}},
        "scores": {"type": "object", "properties": {"x": SCORE, "y": SCORE}},
    },
}
for part in (SCHEMA, SCHEMA["properties"]["choices"], SCHEMA["properties"]["scores"]):
    part |= {"required": list(part["properties"]), "additionalProperties": False}


@pytest.fixture
def make_engine(make_model):
    tokenizer = build_byte_tokenizer()

    def make(**options) -> TorchEngine:
        return TorchEngine(
            make_model(), max_num_seqs=16, max_context=250, schemas=SchemaReader(tokenizer, 264), **options
        )

    return make


def test_random_weights_say_what_the_schema_allows(make_engine, make_request):
    tokenizer = build_byte_tokenizer()
    requests = [make_request(f"{n}", length=9, max_tokens=240, stops=(1,), top_p=1.0) for n in range(16)]
    completions = make_engine().generate([replace(request, schema=json.dumps(SCHEMA)) for request in requests])
    verdicts = [json.loads(str(tokenizer.decode(one.token_ids[:-1]))) for one in completions]
    for verdict, completion in zip(verdicts, completions, strict=True):
        jsonschema.validate(verdict, SCHEMA)
        assert completion.finish == Finish.STOP and np.isfinite(completion.logprobs).all()
    assert {verdict["choices"]["bcd"] for verdict in verdicts} == {"bcd", "neither"}
    assert {verdict["choices"]["fgh"] for verdict in verdicts} == {0, 0.5}
    assert len({verdict["scores"]["x"] for verdict in verdicts}) > 4
    assert len({verdict["reasons"] for verdict in verdicts}) > 8


def test_a_schema_binds_its_own_reply_only(make_engine, make_request):
    """Siblings of one prompt, which share its prefill, say what they do alone; likelihoods are over what may come."""
    free = [make_request("free", length=9, max_tokens=12, seed=n, top_p=1.0) for n in range(4)]
    free = [replace(request, id=f"{request.id} {n}") for n, request in enumerate(free)]
    bound = replace(free[0], id="bound", schema='{"enum": [7]}', stop_token_ids=(1,), seed=9)
    alone = make_engine().generate(free)
    *together, guided = make_engine().generate([*free, bound])
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert guided.token_ids.tolist() == [8 + ord("7"), 1]
    np.testing.assert_allclose(guided.logprobs, 0.0, atol=1e-6)


def test_what_is_aborted_leaves_its_id(make_engine, make_request):
    engine = make_engine()
    bound = replace(make_request("a", length=9, top_p=1.0), schema='{"enum": [77777]}', stop_token_ids=(1,))
    for steps in (0, 1):
        engine.submit(bound)
        for _ in range(steps):
            engine.step()
        assert [name for name, _ in engine.abort()] == ["a"]
    (again,) = engine.generate([replace(bound, schema=None)])
    (alone,) = make_engine().generate([replace(bound, schema=None)])
    np.testing.assert_array_equal(again.token_ids, alone.token_ids)


@pytest.mark.parametrize("schema", ["{", '{"type": "number", "minimum": 3, "maximum": 2}', '{"type": "nonsense"}'])
def test_a_schema_that_cannot_be_followed(make_engine, make_request, schema):
    engine = make_engine()
    with pytest.raises(DataError, match="request a: the JSON schema cannot be"):
        engine.submit(replace(make_request("a"), schema=schema))
    assert not engine.has_work


def test_an_engine_that_was_started_without_schemas(make_model, make_request):
    engine = TorchEngine(make_model(), max_num_seqs=2, max_context=64)
    with pytest.raises(DataError, match="started without schemas"):
        engine.submit(replace(make_request("a"), schema="{}"))
