"""`python -m ckpt_engine_sglang.sglang_update`: puts a checkpoint into running SGLang servers.

    python -m ckpt_engine_sglang.sglang_update --checkpoint-path /models/m --endpoint http://127.0.0.1:30000

Takes the options of SGLang's own updater. Without RANK in its environment it starts itself under torchrun,
one rank for each of the servers' ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_engine.cli import Verbose
from ckpt_engine.cli.files import check_can_be_written
from ckpt_engine.cli.main import reported
from ckpt_engine.cli.push import InferenceGroup, Split, UpdateMethod, Weights, push, share_of
from ckpt_engine.cli.update import DEFAULT_ENDPOINT, not_negative, positive
from ckpt_engine.errors import ConfigError

if TYPE_CHECKING:
    from ckpt_engine.update.request import SocketPaths
    from ckpt_engine.update.session import UpdateReport
    from ckpt_engine_sglang.client import ServerInfo, SglangServer

MODULE = "ckpt_engine_sglang.sglang_update"
_FIRST_VERSION = "default"
"""What SGLang calls the version of the weights that it started with."""


@dataclass(kw_only=True)
class SglangTarget:
    """How `push` asks an SGLang server.

    Args:
        group: whose server it is.
        endpoints: of all inference groups.
        weight_version: what answers carry from then on.
        ready_timeout: seconds that a server may take to get ready after its first weights.
        uds: Unix sockets of all groups' servers; {group} stands for a group's number.
        verify: compare the checksums of all groups' weights.
        only_first: no other group's are updated.
        checksums_file: with `verify`: compare them with these, too; written when it is not there.
    """

    group: InferenceGroup
    endpoints: Sequence[str]
    weight_version: str
    api_key: str | None = None
    admin_api_key: str | None = None
    flush_cache: bool = True
    partial: bool = False
    ignored: Sequence[str] = ()
    ready_timeout: float = 300.0
    uds: str | None = None
    verify: bool = False
    only_first: bool = False
    checksums_file: Path | None = None
    _served_dummy: bool = field(default=False, init=False)

    def wait_until_ready(self, timeout: float) -> None:
        """Also refuses a server that cannot be updated as it is, before anything is sent.

        Raises:
            EngineRequestError: not reached in time.
            ConfigError: its ranks are not those of the group.
        """
        server = self._server()
        server.wait_until_serving(timeout, _say)
        info = server.info()
        _check_fit(server.endpoint, info, self.group.size)
        self._served_dummy = info.dummy and server.weight_version() == _FIRST_VERSION and server.is_ready()

    def receive(self, socket_paths: SocketPaths, timeout: float) -> None:
        """Raises EngineRequestError, with SGLang's own message."""
        self._server().update(
            socket_paths,
            timeout,
            weight_version=self.weight_version,
            flush_cache=self.flush_cache,
            partial=self.partial,
            ignored=self.ignored,
        )

    def paused(self, timeout: float) -> AbstractContextManager[None]:
        """Nothing to do: SGLang lets no request in while it updates."""
        return nullcontext()

    def finish(self) -> None:
        """Waits for the server to be ready; says what a caller must know.

        Raises:
            EngineRequestError: it does not get ready, or (`verify`) its weights are not the other servers'.
        """
        server = self._server()
        if self._served_dummy:
            typer.echo(
                f"warning: {server.endpoint} was serving its dummy weights: without "
                "--checkpoint-engine-wait-weights-before-ready, or once SGLANG_WAIT_WEIGHTS_READY_TIMEOUT "
                "(120 s) has passed, SGLang is ready with them",
                err=True,
            )
        server.wait_until_ready(self.ready_timeout, _say)
        if self.verify and self.group.first == 0:
            self._verify()

    def _server(self, address: tuple[str, str | None] | None = None) -> SglangServer:
        from ckpt_engine_sglang.client import SglangServer

        endpoint, uds = address or (self.group.endpoint, self.group.uds)
        return SglangServer(endpoint, uds, self.api_key, self.admin_api_key)

    def _verify(self) -> None:
        from ckpt_engine_sglang.verify import compare

        count = 1 if self.only_first else self.group.count
        endpoints = self.endpoints if len(self.endpoints) > 1 else [*self.endpoints] * count
        addresses = dict.fromkeys(
            (endpoint.rstrip("/"), self.uds.replace("{group}", str(group)) if self.uds else None)
            for group, endpoint in enumerate(endpoints[:count])
        )
        servers = [self._server(address) for address in addresses]
        typer.echo(compare(servers, self.checksums_file, self.group.size, count - len(servers)))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _check_fit(endpoint: str, info: ServerInfo, size: int) -> None:
    if info.replicas != 1:
        raise ConfigError(
            f"SGLang at {endpoint} runs {info.replicas} data parallel replicas (--dp-size) behind one "
            "address, which SGLang does not update over IPC: start each replica as a server of its own"
        )
    if info.attention_replicas != 1:
        raise ConfigError(
            f"SGLang at {endpoint} runs {info.attention_replicas} groups of data parallel attention "
            "(--attn-dp-size), which cannot be updated in place yet: start it without"
        )
    if info.worker_count != size:
        raise ConfigError(
            f"SGLang at {endpoint} has {info.worker_count} ranks (--tp-size times --pp-size), but "
            f"{size} ranks would update it: give --inference-parallel-size {info.worker_count}"
        )


def sglang_update(
    checkpoint_path: str | Path,
    *,
    endpoints: Sequence[str] = (DEFAULT_ENDPOINT,),
    inference_parallel_size: int | None = None,
    checkpoint_name: str = "my-checkpoint-iter-0",
    weight_version: str | None = None,
    uds: str | None = None,
    api_key: str | None = None,
    admin_api_key: str | None = None,
    partial: bool = False,
    ignored: Sequence[str] = (),
    timeout: float = 600.0,
    server_timeout: float = 600.0,
) -> UpdateReport:
    """What the command does on one rank; call it on all ranks alike. The arguments are the command's options.

    Raises:
        UpdateError: no server has the new weights; the same on every rank.
        PublishError: they have, but one of them could not be asked.
        ConfigError, CheckpointError, EngineRequestError: before anything was sent.
    """
    return push(
        lambda group: SglangTarget(
            group=group,
            endpoints=endpoints,
            weight_version=weight_version or checkpoint_name,
            api_key=api_key,
            admin_api_key=admin_api_key,
            partial=partial,
            ignored=ignored,
        ),
        Weights(path=Path(checkpoint_path), name=checkpoint_name),
        endpoints=endpoints,
        inference_parallel_size=inference_parallel_size,
        uds=uds,
        timeout=timeout,
        health_timeout=server_timeout,
        version=weight_version or checkpoint_name,
    )


def command(
    checkpoint_path: Annotated[
        Path | None,
        typer.Option(
            help="A .safetensors file, or a directory of them or of .npy shards.", show_default=False
        ),
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of the server. Repeated: one server per inference group, in order.",
            show_default=DEFAULT_ENDPOINT,
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="In place of --endpoint: the server's address.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="With --host: its port.", show_default="30000"),
    ] = None,
    uds: Annotated[
        str | None,
        typer.Option(help="Reach the server on this Unix socket; {group} stands for the group's number."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the server's --api-key, or the only one that it has.",
            show_default="what SGLANG_API_KEY holds",
        ),
    ] = None,
    admin_api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with its --admin-api-key, where it has both.",
            show_default="what SGLANG_ADMIN_API_KEY holds",
        ),
    ] = None,
    inference_parallel_size: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks of a server: its --tp-size.", show_default="asks the server"),
    ] = None,
    checkpoint_name: Annotated[str, typer.Option(help="Its name.")] = "my-checkpoint-iter-0",
    weight_version: Annotated[
        str | None,
        typer.Option(help="What the server's answers carry from then on.", show_default="--checkpoint-name"),
    ] = None,
    update_method: Annotated[
        UpdateMethod,
        typer.Option(
            help="broadcast: every rank gives its share. p2p: only the first server is updated, and reads "
            "what other ranks hold from their memory. all: one after the other."
        ),
    ] = UpdateMethod.BROADCAST,
    split: Annotated[
        Split | None,
        typer.Option(
            help="Split the checkpoint over the ranks by whole files, or by tensors, which needs an index.",
            show_default="tensor where there is an index, else file",
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Modules that the checkpoint has no tensor of keep their weights."),
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of tensors that the model need not know, such as 'model.visual.*'."),
    ] = None,
    flush_cache: Annotated[bool, typer.Option(help="Drop what was computed with the old weights.")] = True,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the checksums of all servers' weights afterwards.")
    ] = False,
    checksums_file: Annotated[
        Path | None,
        typer.Option(
            help="With --verify: compare them with those in this file; where there is none, write it. Of a "
            "server that loaded the checkpoint from disk, or of its first update."
        ),
    ] = None,
    sleep_time: Annotated[
        float, typer.Option(callback=not_negative, help="Seconds to stay after the update.")
    ] = 0.0,
    save_metas_file: Annotated[
        Path | None, typer.Option(help="Write what every rank holds to this file, as JSON (rank 0).")
    ] = None,
    load_metas_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead of a checkpoint: join the ranks whose metas these are. Repeated: fleets that hold "
            "the same weights.",
            show_default=False,
        ),
    ] = None,
    join: Annotated[
        list[str] | None,
        typer.Option(
            help="The same of a live fleet: URL of one of its parameter servers (`ckpt-engine serve`).",
            show_default=False,
        ),
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option(help="Write a report to this file, as JSON (rank 0).")
    ] = None,
    timeout: Annotated[
        float, typer.Option(callback=positive, help="Seconds that the update may take.")
    ] = 600.0,
    server_timeout: Annotated[
        float, typer.Option(callback=positive, help="Seconds to wait for the server to serve.")
    ] = 600.0,
    ready_timeout: Annotated[
        float, typer.Option(callback=positive, help="Seconds to wait for it to be ready after the update.")
    ] = 300.0,
    nnodes: Annotated[int, typer.Option(min=1, help="Hosts of this launch; run the command on each.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="This host's number.")] = 0,
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this host.", show_default="all ranks / --nnodes")
    ] = None,
    master_addr: Annotated[str | None, typer.Option(help="Address of host 0.")] = None,
    master_port: Annotated[int, typer.Option(min=1, max=65533, help="A free port there.")] = 29500,
    verbose: Verbose = False,
) -> None:
    """Put a checkpoint into running SGLang servers, all of them or none."""
    if host is not None and endpoint:
        raise typer.BadParameter("give --endpoint or --host, not both", param_hint="--host")
    if port is not None and host is None:
        raise typer.BadParameter("is for --host: say which, or give --endpoint", param_hint="--port")
    if checksums_file is not None and not verify:
        raise typer.BadParameter("is for --verify", param_hint="--checksums-file")
    if node_rank >= nnodes:
        raise typer.BadParameter(f"{node_rank}: of {nnodes} hosts (--nnodes)", param_hint="--node-rank")
    if nnodes > 1 and master_addr is None:
        raise typer.BadParameter("say where host 0 is", param_hint="--master-addr")
    weights = Weights.chosen(
        path=checkpoint_path,
        name=checkpoint_name,
        split=split,
        method=update_method,
        metas_files=load_metas_file or (),
        join=join or (),
    )
    endpoints = endpoint or [f"http://{host}:{port or 30000}" if host else DEFAULT_ENDPOINT]
    api_key = _read_key(api_key_file, "--api-key-file", "SGLANG_API_KEY")
    admin_api_key = _read_key(admin_api_key_file, "--admin-api-key-file", "SGLANG_ADMIN_API_KEY")
    if "RANK" not in os.environ:
        from ckpt_engine_sglang.client import SglangServer

        # Before any wait, and in every rank's place.
        if checkpoint_path is not None:
            share_of(checkpoint_path, split, 0, 1)
        if node_rank == 0:
            check_can_be_written(save_metas_file, "--save-metas-file")
            check_can_be_written(report_file, "--report-file")
            check_can_be_written(checksums_file, "--checksums-file")
        size = inference_parallel_size or _ranks_of(
            SglangServer(endpoints[0], uds.replace("{group}", "0") if uds else None, api_key, admin_api_key),
            server_timeout,
        )
        ranks = nproc_per_node or -(-size * len(endpoints) // nnodes)
        if ranks * nnodes > 1:
            raise typer.Exit(_under_torchrun(ranks, size, nnodes, node_rank, master_addr, master_port))
        inference_parallel_size = size
    push(
        lambda group: SglangTarget(
            group=group,
            endpoints=endpoints,
            weight_version=weight_version or checkpoint_name,
            api_key=api_key,
            admin_api_key=admin_api_key,
            flush_cache=flush_cache,
            partial=partial,
            ignored=ignore or (),
            ready_timeout=ready_timeout,
            uds=uds,
            verify=verify,
            only_first=update_method is UpdateMethod.P2P and checkpoint_path is not None,
            checksums_file=checksums_file,
        ),
        weights,
        endpoints=endpoints,
        inference_parallel_size=inference_parallel_size,
        uds=uds,
        sleep_time=sleep_time,
        save_metas_file=save_metas_file,
        report_file=report_file,
        timeout=timeout,
        health_timeout=server_timeout,
        version=weight_version or checkpoint_name,
    )


def _read_key(path: Path | None, option: str, variable: str) -> str | None:
    if path is None:
        return os.environ.get(variable) or None
    try:
        key = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {path}: {error}") from None
    if not key:
        raise ConfigError(f"{option} {path} is empty")
    return key


def _ranks_of(server: SglangServer, timeout: float) -> int:
    """How many ranks the (first) server has."""
    server.wait_until_serving(timeout, _say)
    return server.info().worker_count


def _under_torchrun(
    ranks: int, size: int, nnodes: int, node_rank: int, master_addr: str | None, master_port: int
) -> int:
    """Runs this command again on each of this host's ranks; the exit status."""
    from ckpt_engine_sglang.launch import run_in_place

    where = (
        ["--standalone"]
        if nnodes == 1
        else [
            *("--nnodes", str(nnodes), "--node-rank", str(node_rank)),
            *("--master-addr", str(master_addr), "--master-port", str(master_port)),
        ]
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks)),
        *("-m", MODULE, *sys.argv[1:], "--inference-parallel-size", str(size)),
    ]
    return run_in_place(command)


app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(reported(command))


def main() -> None:
    """The entry point."""
    app(prog_name=f"python -m {MODULE}")


if __name__ == "__main__":
    main()
