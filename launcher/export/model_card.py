"""The model card of an exported folder: base model, data, settings, losses and the run that trained it.

Strangers read a card, so it contains no path of this machine and no secret. Of a local folder or file, it shows only the name.
The format is described at https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from launcher.checkpoint.manifest import Manifest
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.config.sections.model import is_local_path
from launcher.export.hf_folder import CARD, ExportedFolder
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count, format_size
from launcher.security.redaction import redact

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

Rows = Sequence[tuple[str, str]]

_LICENSE_KEYS = ("license", "license_name", "license_link")
_EVAL_LOSS = re.compile(r"eval/(.+)/loss")
# Name prefixes of the metrics that a card shows.
METRICS = ("train/loss", "eval/")
_COMMIT_DIGITS = 12


def render_model_card(
    plan: LaunchPlan,
    manifest: Manifest,
    metrics: Sequence[Mapping[str, Any]],
    exported: ExportedFolder,
    plans: Sequence[LaunchPlan] = (),
) -> str:
    """Return the text of README.md for an exported checkpoint.

    `plan` is the plan that the checkpoint was saved under, `plans` those of all attempts up to that one. `metrics` holds lines
    of metrics.jsonl with METRICS; lines after the checkpoint's step are ignored.
    """
    # The import takes longer than the rest of the card.
    from huggingface_hub import ModelCard, ModelCardData

    base = base_front_matter(Path(plan.model.path)) if plan.model.path else {}
    license_fields = {key: base[key] for key in _LICENSE_KEYS if isinstance(base.get(key), str)}
    data = ModelCardData(
        **({"license": "unknown"} | license_fields),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["deepspeed", "fine-tuned"],
        base_model=_hub_origin(plan, base),
    )
    # The checkpoint, and those that its initial weights came from.
    lineage = [("run", plan.run_name), ("step", f"{manifest.step:,}"), ("attempt", str(manifest.attempt))]
    lineage.append(("plan digest", manifest.plan_digest))
    if plan.lineage is not None:
        for one in (plan.lineage, *plan.lineage.ancestors):
            lineage.append(("from", f"run {one.run_name} at step {one.step:,}, plan digest {one.plan_digest}"))
    origin = plan.provenance
    commit = f" at commit {origin.git_commit[:_COMMIT_DIGITS]}" if origin.git_commit else ""
    changed = ", with uncommitted changes" if origin.git_dirty else ""
    versions = {"python": origin.python, **origin.packages}
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        run_name=plan.run_name,
        random_init=plan.config.model.init == "random",
        # Text of a cell is neither Markdown nor HTML.
        cell=lambda text: re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split())),
        sections={
            "Base model": _base_rows(plan, base),
            "Data": _data_rows(plan),
            "Settings": _settings_rows(plan, manifest.step, plans),
            "Losses": _loss_rows(manifest, metrics),
            "Weights": _weight_rows(exported),
            "Lineage": lineage,
            "Software": [
                ("launcher", f"{origin.launcher_version}{commit}{changed}"),
                ("packages", ", ".join(f"{name} {version}" for name, version in versions.items())),
                ("planned at", origin.created_at),
            ],
        },
    )
    return str(card)


def base_front_matter(folder: Path) -> dict[str, Any]:
    """Read the front matter of a model folder's card; empty if there is none that can be parsed."""
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _hub_origin(plan: LaunchPlan, base: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the base model, even for a local folder that was fine-tuned from it."""
    path = plan.config.model.path or ""
    if plan.config.model.init == "random":
        return None
    if HUB_ID_PATTERN.fullmatch(path) and not is_local_path(path):
        return path
    named = base.get("base_model")
    return named if isinstance(named, str) and HUB_ID_PATTERN.fullmatch(named) else None


def _base_rows(plan: LaunchPlan, base: Mapping[str, Any]) -> Rows:
    model = plan.config.model
    architecture = f"{plan.model.config.get('model_type', 'unknown')}, {plan.model.num_params:,} parameters"
    if not model.path:
        return [("model", "none: trained from random weights"), ("architecture", architecture)]
    rows = [("model", _public(model.path))]
    if model.revision:
        rows.append(("revision", model.revision))
    if origin := _hub_origin(plan, base):
        rows.append(("on the Hub", origin))
    license_ = base.get("license")
    named = ", ".join(base[key] for key in _LICENSE_KEYS if isinstance(base.get(key), str))
    rows.append(("license", named if license_ and named else "unknown: see the base model"))
    return [*rows, ("architecture", architecture)]


def _data_rows(plan: LaunchPlan) -> Rows:
    config, data = plan.config.data, plan.data
    rows = [("sources", ", ".join(f"{source.name} ({_public(source.path)})" for source in config.sources))]
    if config.system:
        # The exported template does not contain it.
        rows.append(("system message of all chats", config.system))
    if data is not None:
        rows += [
            ("documents", f"{data.num_docs:,}, of which {data.truncated_docs:,} were cut"),
            ("rows", f"{data.num_rows:,} of at most {config.max_length:,} tokens"),
            ("tokens", f"{data.num_tokens:,}, of which {data.num_trained_tokens:,} are trained"),
            ("held out", f"{format_count(data.num_eval_rows, 'row')}, {format_count(data.num_eval_tokens, 'token')}"),
        ]
    return rows


def _settings_rows(plan: LaunchPlan, step: int, plans: Sequence[LaunchPlan]) -> Rows:
    """Return the settings of the plan that the checkpoint of `step` was saved under, and which sections resumes changed."""
    config, batch, topology = plan.config, plan.batch, plan.topology
    optim, zero = config.optim, config.deepspeed
    decay = f"weight decay {optim.weight_decay:g}, betas {optim.betas[0]:g} and {optim.betas[1]:g}, eps {optim.eps:g}"
    clip = f"gradient norm at most {config.train.grad_clip:g}" if config.train.grad_clip else "gradients not clipped"
    warmup = format_count(optim.warmup_steps, "step")
    split = f"{format_count(batch.micro_batch_size, 'row')} per rank, {batch.accumulation} accumulated"
    nodes = f"{format_count(topology.world_size, 'rank')} on {format_count(topology.nodes, 'node')} ({topology.device})"
    sections = ("model", "data", "optim", "train", "deepspeed")
    changed = [name for name in sections if any(getattr(p.config, name) != getattr(config, name) for p in plans)]
    length = format_count(step, "step")
    if batch.max_steps and batch.epochs:
        length += f", {round(batch.epochs * step / batch.max_steps, 2):g} of {round(batch.epochs, 2):g} epochs"
    text = f"settings of {', '.join(changed)} differed in earlier attempts; those above are the last ones"
    return [
        ("optimizer", f"{optim.name}, {decay}; {clip}"),
        ("learning rate", f"{optim.lr:g} at its peak"),
        ("schedule", f"{optim.schedule}, {warmup} of warm-up, down to {optim.min_lr_ratio:g} of the peak"),
        ("batch", f"{format_count(batch.global_batch_size, 'row')} per step ({split})"),
        ("length", length),
        (
            "packing",
            "several documents per row, without attention between them" if config.data.packing else "one document per row",
        ),
        ("seed", str(config.run.seed)),
        ("dtype", f"{config.model.dtype}; master weights and optimizer states in fp32"),
        ("ZeRO", f"stage 3, optimizer offload {zero.offload_optimizer}, parameter offload {zero.offload_params}"),
        ("world size", nodes),
        *([("changed", text)] if changed else []),
    ]


def _loss_rows(manifest: Manifest, metrics: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the last training loss and each held-out set's first and last loss, up to the checkpoint's step."""
    rows = []
    # An attempt that resumed from an earlier step logs steps again: the last line for a step counts.
    lines = [line for line in metrics if line["trainer/step"] <= manifest.step]
    trained = [line for line in lines if "train/loss" in line]
    if trained:
        rows.append((f"training, step {trained[-1]['trainer/step']:,}", f"{trained[-1]['train/loss']:.4f}"))
    held_out: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if match := _EVAL_LOSS.fullmatch(key):
                held_out.setdefault(match.group(1), []).append((line["trainer/step"], value))
    for name, losses in held_out.items():
        for step, loss in dict.fromkeys((losses[0], losses[-1])):
            rows.append((f"{name}, step {step:,}", f"{loss:.4f}"))
    if not held_out and manifest.eval_loss is not None:
        rows.append((f"{manifest.eval_set.replace('_', ' ')}, step {manifest.step:,}", f"{manifest.eval_loss:.4f}"))
    return rows or [("none", "nothing was logged")]


def _weight_rows(exported: ExportedFolder) -> Rows:
    compared = "not compared with the engine's"
    if exported.num_compared:
        compared = f"{exported.num_compared} of {exported.num_tensors} tensors match the engine's weights by digest"
    files = format_count(len(exported.files), "file")
    rows = [
        ("dtype", exported.dtype),
        ("size", f"{exported.num_parameters:,} parameters, {format_size(exported.num_bytes)} in {files}"),
        ("weights", compared),
    ]
    if exported.added_stop_ids:
        ids = ", ".join(map(str, exported.added_stop_ids))
        rows.append(("stop tokens", f"{ids} added to the base model's: they end turns in the data"))
    if exported.parity is not None:
        rows.append(
            ("logits", f"mean KL to the engine's {exported.parity.mean_kl:.1e} nats over {exported.parity.num_tokens} tokens")
        )
    return rows


def _public(source: str) -> str:
    """Return a path, address or Hub id without directories of this machine and without credentials."""
    if is_local_path(source):
        return redact(PurePath(source).name) or "a local folder"
    if HUB_ID_PATTERN.fullmatch(source) or source.startswith(("package:", "builtin:")):
        return redact(source)
    return redact(source.rstrip("/").rpartition("/")[2])
