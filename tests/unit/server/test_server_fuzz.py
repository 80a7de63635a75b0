"""The API by its own OpenAPI document: schemathesis sends what fits it, and what does not, to the app itself.

No request ends in an error that nobody expected, and every status and body is one that the document tells of.
`make fuzz` runs it for longer.
"""

from __future__ import annotations

import pytest
import schemathesis
from api_for_server_tests import StubServer
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ckpt_engine.server.access import Access
from ckpt_engine.server.app import create_app
from ckpt_engine.settings import Settings
from tests.fuzz.fuzzing import fuzz

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPERATIONS = (
    "POST /v1/checkpoints/{name}/files",
    "DELETE /v1/checkpoints/{name}",
    "POST /v1/checkpoints/{name}/gather-metas",
    "POST /v1/checkpoints/{name}/update",
    "GET /v1/healthz",
    "GET /v1/metas",
    "POST /v1/metas",
    "GET /v1/checkpoints",
    "GET /v1/operations",
    "POST /v1/cancel",
    "GET /metrics",
)
ENDLESS = ("GET /v1/events",)
"""Not asked here: it has no body, and its answer does not end."""


def schema_of(access: Access) -> schemathesis.schemas.BaseSchema:
    app = create_app(StubServer(), access=access)  # type: ignore[arg-type]
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_all_operations_are_fuzzed() -> None:
    schema = schema_of(Access.of(Settings(), own_user=True))
    assert sorted(found.ok().label for found in schema.get_all_operations()) == sorted(OPERATIONS + ENDLESS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_requests(label: str) -> None:
    # Engines' names are refused before anything is sent: what fits the document may name any.
    access = Access.of(Settings(allowed_engines="engine.invalid"), own_user=True)
    (operation,) = [
        found.ok() for found in schema_of(access).get_all_operations() if found.ok().label == label
    ]

    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    cases = [operation.as_strategy(mode) for mode in GenerationMode]
    fuzz(f"HTTP {label}", st.one_of(cases) if "{" in label or "POST" in label else cases[0], check)
