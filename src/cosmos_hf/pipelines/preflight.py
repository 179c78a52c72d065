"""Preflight: does a folder hold what it says, do its parts fit each other, and do they compute what they did when it was made?

    from cosmos_hf import preflight

    print(preflight("path/to/pipeline"))

A training that "succeeds" and a conversion that loses a tensor both end in a folder that loads; what they have in common is that
nobody looked. This looks, and says in words what is wrong.
"""

import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from .component_checks import CHECKS, PROBES, check_fit

RECORD = "preflight.json"
# Largest difference to the recorded outputs, in standard deviations of each: rounding of other hardware, or of half precision.
_TOLERANCE = {"torch.float32": 2e-3}
_HALF_TOLERANCE = 0.1


class PreflightError(ValueError):
    """What is wrong, one problem a line."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class PreflightReport:
    """`facts`: what was found, one line each. `outputs`: a few values of each part's output for fixed inputs, and their dtype."""

    facts: list[str] = field(default_factory=list)
    outputs: dict[str, dict] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(self.facts)


@torch.no_grad()
def preflight(pipeline_or_folder, *, record: bool = False, **options) -> PreflightReport:
    """Load strictly, check every part and how they fit, run each once on a small fixed input, compare with the record.

    Args:
        pipeline_or_folder: a pipeline, or the folder of a pipeline or of one part, in our layout or the one published for
            diffusers.
        record: write the outputs into the folder (`preflight.json`) for later runs to compare with, in place of comparing.
        options: for `from_pretrained`, for example `torch_dtype`.

    Raises:
        PreflightError: a ValueError that names everything that is wrong.
    """
    folder = None
    if isinstance(pipeline_or_folder, str | Path):
        folder = Path(pipeline_or_folder)
        pipeline, parts = _load(folder, options)
    else:
        pipeline, parts = pipeline_or_folder, _parts(pipeline_or_folder)
        if record or options:
            raise ValueError("record and loading options need a folder, not a pipeline")
    report, problems = PreflightReport(), []
    _look(pipeline, parts, folder is None or _has_settings(folder), report, problems)
    for name, inner in {} if pipeline is None else _inner_pipelines(pipeline).items():
        found, wrong = PreflightReport(), []
        _look(inner, _parts(inner), True, found, wrong)
        report.facts += [f"{name}: {fact}" for fact in found.facts]
        report.outputs |= {f"{name}.{part}": output for part, output in found.outputs.items()}
        problems += [f"{name}: {problem}" for problem in wrong]
    if folder is not None and not problems:
        if record:
            (folder / RECORD).write_text(json.dumps(_made_by() | {"outputs": report.outputs}, indent=1) + "\n")
            report.facts.append(f"outputs recorded in {RECORD}")
        elif (folder / RECORD).exists():
            _compare(json.loads((folder / RECORD).read_text()), report, problems)
    if problems:
        raise PreflightError(problems)
    return report


def _load(folder: Path, options: dict) -> tuple[DiffusionPipeline | None, dict]:
    """(pipeline or None, its parts), strictly; PreflightError where the folder does not load."""
    try:
        if (folder / "model_index.json").exists():
            from .loading import pipeline_class  # which imports every pipeline

            pipeline = pipeline_class(folder).from_pretrained(folder, **options)
            return pipeline, _parts(pipeline)
        if (folder / "config.json").exists():
            config = json.loads((folder / "config.json").read_text())
            name, cls = _component_class(
                config.get("_class_name") or config["architectures"][0]
            )  # diffusers, transformers
            return None, {name: cls.from_pretrained(folder, **options)}
    except (ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
        raise PreflightError([f"{folder} does not load: {error}"]) from error
    raise PreflightError(
        [f"{folder} has neither a model_index.json (a pipeline) nor a config.json (one of its parts)"]
    )


def _has_settings(folder: Path) -> bool:
    """False for a folder published for diffusers, and for a part's."""
    index = folder / "model_index.json"
    return index.exists() and "num_frames" in json.loads(index.read_text())


def _look(pipeline, parts: dict, own_settings: bool, report: PreflightReport, problems: list[str]):
    for name, part in parts.items():
        for check in CHECKS:
            check(name, part, report.facts, problems)
    if pipeline is not None:
        check_fit(pipeline, own_settings, report.facts, problems)
    if not problems:  # a part that does not fit fails in ways that say less
        _run(parts, pipeline, report, problems)


def _component_class(class_name: str):
    from ..models.ar_cosmos import CosmosARForCausalLM
    from ..models.autoencoder_cosmos import CosmosVideoTokenizer
    from ..models.transformer_cosmos import CosmosWorldTransformer3D

    known = {
        "CosmosWorldTransformer3D": ("transformer", CosmosWorldTransformer3D),
        "CosmosTransformer3DModel": ("transformer", CosmosWorldTransformer3D),
        "CosmosARForCausalLM": ("transformer", CosmosARForCausalLM),
        "CosmosVideoTokenizer": ("vae", CosmosVideoTokenizer),
        "AutoencoderKLCosmos": ("vae", CosmosVideoTokenizer),
    }
    if class_name not in known:
        raise ValueError(f"its config names the class {class_name}; there is a preflight for {', '.join(known)}")
    return known[class_name]


def _parts(pipeline) -> dict:
    """Its components; those of a pipeline within it, as a diffusion decoder is, are looked at by themselves."""
    return {name: part for name, part in _present(pipeline) if not isinstance(part, DiffusionPipeline)}


def _inner_pipelines(pipeline) -> dict:
    return {name: part for name, part in _present(pipeline) if isinstance(part, DiffusionPipeline)}


def _present(pipeline):
    return [(name, part) for name, part in pipeline.components.items() if part is not None]


def _run(parts: dict, pipeline, report: PreflightReport, problems: list[str]):
    """One small forward of every part; outputs that are not finite or say nothing are problems."""
    for name, probe in PROBES.items():
        if name not in parts:
            continue
        try:
            output = probe(parts, pipeline)
        except (ValueError, RuntimeError, IndexError) as error:
            problems.append(f"{name} fails on a small input: {error}")
            continue
        if output is None:
            continue
        output = output.detach().float().cpu().flatten()
        if not output.isfinite().all():
            problems.append(f"{name} computes values that are not finite")
        elif output.std() == 0:
            problems.append(f"{name} computes the same value everywhere: it is untrained, or its last layer was lost")
        else:
            places = torch.linspace(0, len(output) - 1, 12).long()
            report.outputs[name] = dict(
                dtype=str(getattr(parts[name], "dtype", torch.float32)),
                std=output.std().item(),
                values=[round(value, 6) for value in output[places].tolist()],
            )


def _compare(record: dict, report: PreflightReport, problems: list[str]):
    recorded = record["outputs"]
    if missing := sorted(recorded.keys() - report.outputs.keys()):
        problems.append(f"{RECORD} has outputs of {', '.join(missing)}, which the folder lacks")
    for name in sorted(recorded.keys() & report.outputs.keys()):
        before, now = recorded[name], report.outputs[name]
        tolerance = max(_TOLERANCE.get(each["dtype"], _HALF_TOLERANCE) for each in (before, now))
        differences = [abs(a - b) / before["std"] for a, b in zip(before["values"], now["values"], strict=True)]
        if max(differences) > tolerance:
            problems.append(
                f"{name} does not compute what it did when the folder was made: off by {max(differences):.2g} standard "
                f"deviations, {tolerance:g} is allowed. Its weights or its config were changed or damaged"
            )
    if not problems:
        report.facts.append(f"all outputs equal those recorded by cosmos-hf {record['versions']['cosmos-hf']}")


def _made_by() -> dict:
    names = ("cosmos-hf", "torch", "diffusers", "transformers")
    return {"versions": {name: version(name) for name in names} | {"python": platform.python_version()}}
