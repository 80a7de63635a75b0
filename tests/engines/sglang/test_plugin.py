"""What the plugin does with a version of SGLang that it does not know: SGLang's own handler, our worker."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ckpt_engine_sglang import plugin
from ckpt_engine_sglang.options import with_options

from ckpt_engine import ParameterServer
from ckpt_engine.compat import DIRECTORY
from ckpt_engine.errors import UpdateError
from ckpt_engine.update.request import SocketPaths

pytestmark = pytest.mark.timeout(120)
STOCK_UUID = "GPU-stock"


@pytest.fixture(autouse=True)
def in_process(sglang_in_process: None) -> None: ...


def test_the_installed_version_is_known() -> None:
    assert plugin.unknown_layout() is None


@pytest.mark.parametrize("name", ["_observe_weight_load", "flush_cache_after_weight_update"])
def test_a_version_that_lacks_something(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from sglang.srt.managers.scheduler_components import weight_updater

    monkeypatch.delattr(weight_updater.SchedulerWeightUpdaterManager, name)
    assert str(plugin.unknown_layout()).endswith(f"has no {name}")


def test_a_version_whose_methods_are_other_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler_components import weight_updater

    def flush(self: object, everything: bool) -> None: ...

    manager = weight_updater.SchedulerWeightUpdaterManager
    monkeypatch.setattr(manager, "flush_cache_after_weight_update", flush)
    assert "flush_cache_after_weight_update takes ['self', 'everything']" in str(plugin.unknown_layout())
    monkeypatch.undo()
    monkeypatch.setattr(manager, "update_weights_from_ipc", lambda self, request, more: None)
    assert "update_weights_from_ipc takes ['self', 'request', 'more']" in str(plugin.unknown_layout())


class Model(torch.nn.Module):
    """Passes over names that it does not know, as SGLang's do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
        self.head = torch.nn.Parameter(torch.zeros(4, 8), requires_grad=False)

    def load_weights(self, tensors: Any) -> None:  # noqa: ANN401
        mine = dict(self.named_parameters())
        for name, tensor in tensors:
            if name in mine:
                mine[name].copy_(tensor)


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Model, Any]]:
    """A model, and SGLang's own handler for it, which has imported what the plugin gave it."""
    module = "sglang.srt.checkpoint_engine.checkpoint_engine_worker"
    for name in (plugin.STOCK_PACKAGE, f"{plugin.STOCK_PACKAGE}.worker", module):
        monkeypatch.delitem(sys.modules, name, raising=False)
    plugin.serve_stock_handler("it is too new")
    handler = importlib.import_module(module).SGLangCheckpointEngineWorkerExtensionImpl
    monkeypatch.setattr(handler, "get_device_uuid", lambda _: STOCK_UUID)
    model = Model()
    made = handler(SimpleNamespace(model=model))
    yield model, made
    if made._zmq_ctx is not None:  # it has been asked to update
        made._zmq_ctx.term()
    for name in (plugin.STOCK_PACKAGE, f"{plugin.STOCK_PACKAGE}.worker", module):
        sys.modules.pop(name, None)


def update(
    handler: Any,  # noqa: ANN401
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    *,
    partial: bool = False,
    ignored: Sequence[str] = (),
) -> None:
    def ask(paths: SocketPaths) -> None:
        handler.update_weights_from_ipc({uuid: with_options(each, partial, ignored) for uuid, each in paths})

    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", STOCK_UUID)
    with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        ps.register_checkpoint("new", named_tensors=tensors)
        ps.gather_metas("new")
        ps.update("new", ask, timeout=60)


def test_sglang_s_own_handler_updates(stock: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, handler = stock
    tensors = {"norm": torch.arange(8.0), "head": torch.ones(4, 8)}
    update(handler, tensors, monkeypatch)
    assert torch.equal(model.norm, tensors["norm"])
    assert torch.equal(model.head, tensors["head"])


@pytest.mark.usefixtures("stock")
def test_its_other_module_is_there_too() -> None:
    """On NPUs SGLang asks it for the device's key."""
    name = f"{plugin.STOCK_PACKAGE}.device_utils"
    try:
        found = importlib.import_module(name).npu_generate_uuid
    finally:
        sys.modules.pop(name, None)
    assert found.__module__ in (name, "ckpt_engine_ascend.identity")


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"norm": (8,), "head": (4, 8), "heads": (1,)}, "the model has no place for heads"),
        ({"norm": (8,)}, "does not fill head"),
    ],
)
def test_it_refuses_before_a_byte_moves(
    stock: tuple[Model, Any],
    monkeypatch: pytest.MonkeyPatch,
    tensors: dict[str, tuple[int, ...]],
    told: str,
) -> None:
    model, handler = stock
    with pytest.raises(UpdateError, match=told):
        update(handler, {name: torch.ones(shape) for name, shape in tensors.items()}, monkeypatch)
    assert not model.norm.any()
    assert not model.head.any()


def test_it_allows_what_it_is_told_to(stock: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, handler = stock
    tensors = {"norm": torch.ones(8), "head": torch.ones(4, 8), "vision.a": torch.ones(1)}
    with pytest.raises(UpdateError, match=r"the model has no place for vision\.a"):
        update(handler, tensors, monkeypatch, ignored=["audio.*"])
    assert not model.norm.any()
    update(handler, tensors, monkeypatch, ignored=["audio.*", "vision.*"])
    assert model.norm.all()
    assert model.head.all()


def test_it_updates_a_part_where_it_is_told_to(
    stock: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, handler = stock
    model.part = torch.nn.Linear(2, 3).requires_grad_(False)
    part = {"part.weight": torch.ones(3, 2), "part.bias": torch.ones(3)}
    with pytest.raises(UpdateError, match="does not fill norm"):
        update(handler, part, monkeypatch)
    update(handler, part, monkeypatch, partial=True)
    assert model.part.weight.eq(1).all()
    assert not model.norm.any()


@pytest.fixture
def another_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Installed beside ours: of the name, and with the metadata, of the reference's."""
    package, metadata = tmp_path / plugin.STOCK_PACKAGE, tmp_path / "checkpoint_engine-0.4.2.dist-info"
    for directory in (package, metadata):
        directory.mkdir()
    (package / "__init__.py").write_text("")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: checkpoint-engine\nVersion: 0.4.2\n")
    for name in [each for each in sys.modules if each.split(".")[0] == plugin.STOCK_PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return package


def test_another_package_beside_a_version_that_is_known(
    another_package: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: hooks.append(target))
    with caplog.at_level(logging.WARNING, logger=plugin.__name__):
        plugin.register()
    assert f"{plugin.MANAGER}.update_weights_from_ipc" in hooks
    assert f"not the package checkpoint-engine 0.4.2 ({another_package})" in caplog.text
    assert "SGLANG_PLUGINS" in caplog.text


def test_ours_on_the_path_is_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.other_package() is None
    monkeypatch.syspath_prepend(DIRECTORY)
    assert importlib.util.find_spec(plugin.STOCK_PACKAGE) is not None
    assert plugin.other_package() is None
