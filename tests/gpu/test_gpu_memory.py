"""What only a GPU can show: memory that comes back, errors that the device reports late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_engine.devices import make_device, map_ring, pci_addresses
from ckpt_engine.devices.cuda import CudaPinner, CudaStaging, ServerRing
from ckpt_engine.devices.handles import CudaRing
from ckpt_engine.errors import ConfigError, DeviceError, ProtocolError
from ckpt_engine.settings import load_settings

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
MiB = 1024 * 1024


def free() -> int:
    return int(torch.cuda.mem_get_info(0)[0])


def run_alone(body: str, **environment: str) -> dict[str, Any]:
    """Runs a program with a parameter server `ps` and a worker process `worker`; its last line as JSON."""
    program = (
        "import json, os, sys, torch\n"
        "from ckpt_engine import ParameterServer\n"
        "from tests.support.rank import Worker\n"
        "worker = Worker(0)\n"
        "ps = ParameterServer(device='cuda')\n"
        "def update(name, fault=None):\n"
        "    return ps.update(name, lambda paths: worker.update(paths, fault), timeout=60)\n"
        "free = lambda: torch.cuda.mem_get_info(0)[0]\n" + body
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": PATHS, "TEST_DEVICE": "cuda", "CKPT_ENGINE_DEVICE_UUID": "GPU-alone"}
        | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_device_memory_comes_back_after_each_update() -> None:
    found = run_alone(
        "tensors = {f't{i}': torch.randn(1024, 1024) for i in range(100)}\n"
        "ps.register_checkpoint('a', named_tensors=tensors)\n"
        "ps.gather_metas('a')\n"
        "update('a')\n"
        "before = free()\n"
        "for _ in range(10): update('a')\n"
        "ps.unregister_checkpoint('a')\n"
        "print(json.dumps({'lost': before - free()}))\n"
    )
    assert abs(found["lost"]) <= 4 * MiB


@pytest.mark.parametrize("kind", ["run", "post_hook"])
def test_an_error_that_the_device_reports_late_fails_the_update(kind: str) -> None:
    found = run_alone(
        "ps.register_checkpoint('a', named_tensors={'t': torch.ones(8, 8)})\n"
        "ps.gather_metas('a')\n"
        f"fault = {{'kind': {kind!r}, 'bucket': 0, 'action': 'device'}}\n"
        "import time\nbegin = time.monotonic()\n"
        "try:\n    update('a', fault)\n    ended = 'committed'\n"
        "except Exception as error:\n    ended = str(error)\n"
        "print(json.dumps({'ended': ended, 'seconds': time.monotonic() - begin}))\n"
    )
    assert "assert" in found["ended"], found
    assert ("stage buckets" if kind == "run" else "stage post_hook") in found["ended"], found
    assert found["seconds"] < 20, found


def test_weights_come_from_tensors_on_the_device_too() -> None:
    found = run_alone(
        "from tests.support.worker import digest\n"
        "tensors = {f't{i}': torch.randn(513, 7, device='cuda')[:, 1:] for i in range(40)}\n"
        "expected = {name: digest(tensor) for name, tensor in tensors.items()}\n"
        "ps.register_checkpoint('a', named_tensors=tensors)\n"
        "ps.gather_metas('a')\n"
        "update('a')\n"
        "print(json.dumps({'equal': worker.last['digests'] == expected}))\n"
    )
    assert found["equal"]


def test_files_in_memory_are_pinned_where_they_are() -> None:
    found = run_alone(
        "import tempfile\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from tests.support.worker import digest\n"
        "def pinned():\n"
        "    status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "    return int(status['VmPin'].split()[0]) + int(status['VmLck'].split()[0])\n"
        "tensors = {f't{i}': torch.randn(1000, 1000) for i in range(20)}\n"
        "expected = {name: digest(tensor) for name, tensor in tensors.items()}\n"
        "torch.cuda.mem_get_info(0)\n"
        "with tempfile.TemporaryDirectory(dir='/dev/shm') as directory:\n"
        "    path = Path(directory) / 'model.safetensors'\n"
        "    save_file(tensors, path)\n"
        "    before = pinned()\n"
        "    ps.register_checkpoint('a', files=[path], use_inplace_pin_memory=True)\n"
        "    found = {'removed': not path.exists()}\n"
        "    ps.gather_metas('a')\n"
        "    update('a')\n"
        "    found['equal'] = worker.last['digests'] == expected\n"
        "    ps.unregister_checkpoint('a')\n"
        "    found['left'] = pinned() - before\n"
        "print(json.dumps(found))\n"
    )
    assert (found["removed"], found["equal"]) == (True, True)
    assert found["left"] <= 0


def test_the_pool_serves_one_checkpoint_after_the_other() -> None:
    found = run_alone(
        "from tests.support.worker import digest\n"
        "equal, addresses = [], set()\n"
        "for number in (30, 20, 30):\n"
        "    tensors = {f't{i}': torch.randn(500, 500) for i in range(number)}\n"
        "    ps.register_checkpoint('a', named_tensors=tensors, use_shared_memory_pool=True)\n"
        "    ps.gather_metas('a')\n"
        "    update('a')\n"
        "    held = worker.last['digests']\n"
        "    equal.append(all(held[name] == digest(tensor) for name, tensor in tensors.items()))\n"
        "    addresses.add(ps._registry.get('a').arena.address)\n"
        "    ps.unregister_checkpoint('a')\n"
        "ps.unregister_checkpoint('a', force=True)\n"
        "print(json.dumps({'equal': equal, 'arenas': len(addresses)}))\n"
    )
    assert found == {"equal": [True] * 3, "arenas": 1}


def test_a_worker_may_number_its_devices_in_another_way() -> None:
    """With one GPU both indices are 0; the worker's numbering is its own all the same (by UUID)."""
    found = run_alone(
        "uuid = 'GPU-' + str(torch.cuda.get_device_properties(0).uuid)\n"
        "worker.close()\n"
        "worker = Worker(0, CUDA_VISIBLE_DEVICES=uuid)\n"
        "ps.register_checkpoint('a', named_tensors={'t': torch.ones(8, 8)})\n"
        "ps.gather_metas('a')\n"
        "update('a')\n"
        "print(json.dumps({'outcome': worker.last['status']['outcome']}))\n"
    )
    assert found["outcome"] == "committed"


def test_a_kept_ring_is_used_again() -> None:
    found = run_alone(
        "ps.register_checkpoint('a', named_tensors={'t': torch.ones(1024, 1024)})\n"
        "ps.gather_metas('a')\n"
        "req = lambda paths: worker.update(paths, None)\n"
        "handles = set()\n"
        "for _ in range(3):\n"
        "    ps.update('a', req, keep_buffers=True)\n"
        "    handles.add(ps._me.buffers.ring(4194304, 1).handle().memory)\n"
        "kept = ps._me.buffers.nbytes\n"
        "ps.update('a', req)\n"
        "print(json.dumps({'handles': len(handles), 'kept': kept, 'after': ps._me.buffers.nbytes}))\n"
    )
    assert found == {"handles": 1, "kept": 4 * MiB, "after": 0}


def test_a_ring_takes_no_part_of_torchs_allocator() -> None:
    torch.cuda.init()
    reserved = torch.cuda.memory_reserved(0)
    ring = ServerRing(0, 64 * MiB, 3)
    assert torch.cuda.memory_reserved(0) == reserved
    ring.view(0, 64 * MiB).fill_(7)
    before = free()
    assert int(ring.view(12345, 1)[0]) == 7
    ring.close()
    ring.close()
    assert free() - before >= 63 * MiB


def test_staging_is_freed_too() -> None:
    before = free()
    staging = CudaStaging(0, 64 * MiB)
    assert before - free() >= 63 * MiB
    staging.close()
    assert abs(before - free()) <= 2 * MiB


def test_an_allocation_that_does_not_fit_says_so_and_harms_nothing() -> None:
    with pytest.raises(DeviceError, match="out of memory"):
        ServerRing(0, 1 << 45, 3)
    assert float(torch.ones(3, device="cuda").sum()) == 3.0


def test_a_worker_refuses_rings_that_are_not_its_own() -> None:
    ring = ServerRing(0, MiB, 2)
    try:
        handle = ring.handle()
        with pytest.raises(ConfigError, match="device_id"):
            map_ring(handle, [], None)
        other = CudaRing(nbytes=MiB, memory=handle.memory, event_count=2, device="GPU-other")
        with pytest.raises(ConfigError, match="GPU-other"):
            map_ring(other, [], 0)
        with pytest.raises(ProtocolError, match="events"):
            map_ring(CudaRing(nbytes=MiB, memory=handle.memory, event_count=0, device=handle.device), [], 0)
        with pytest.raises(DeviceError):
            map_ring(CudaRing(nbytes=MiB, memory=b"x" * 64, event_count=2, device=handle.device), [], 0)
        with pytest.raises(DeviceError, match="64"):
            map_ring(CudaRing(nbytes=MiB, memory=b"x", event_count=2, device=handle.device), [], 0)
        assert float(torch.ones(3, device="cuda").sum()) == 3.0
    finally:
        ring.close()


def test_pinned_memory_is_unpinned() -> None:
    pinner = CudaPinner(0)
    tensor = torch.empty(64 * MiB, dtype=torch.uint8)
    address = tensor.data_ptr() // 4096 * 4096
    pinner.pin(address, 32 * MiB)
    assert tensor.is_pinned()
    pinner.unpin(address)
    assert not tensor.is_pinned()


def test_the_device_names_itself_as_nvml_does() -> None:
    device = make_device("cuda", load_settings(), 0)
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    assert device.uuid() in listed


def test_each_gpu_has_a_pci_address_that_the_kernel_knows() -> None:
    addresses = pci_addresses("cuda")
    assert len(set(addresses)) == torch.cuda.device_count()
    for address in addresses:
        vendor = Path("/sys/bus/pci/devices", address, "vendor")
        if vendor.parent.parent.exists():  # some sandboxes show no buses
            assert vendor.read_text().strip() == "0x10de"
