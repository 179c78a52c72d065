"""How much memory the state of a run takes on each device: weights, gradients, optimizer, average. Activations come on top."""

GIB = 2**30
# Which parts each kind of launch shares out among the processes.
SHARED = {
    "one": (),
    "ddp": (),
    "zero2": ("gradients", "optimizer", "master"),
    "zero3": ("weights", "gradients", "optimizer", "average"),
    "fsdp2": ("weights", "gradients", "optimizer", "average"),
}
# Bytes of a frozen base's weight: as it is, in 16 bits, in 4 bits with its scales (NF4, blocks of 64, double quantisation).
BASE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "nf4": 0.516}


def estimate_memory(
    num_parameters: float,
    launch: str = "one",
    processes: int = 1,
    trained: float | None = None,
    base: str = "float32",
    average: bool = True,
    mixed_precision: bool = False,
) -> dict[str, float]:
    """GiB per device by part, and their "total"; AdamW in float32, as `fit` runs it.

    Args:
        num_parameters: of the whole model.
        launch: a name of `training/launch/`, or "one".
        processes: devices that share.
        trained: how many parameters learn (None: all); the others are a frozen base, as under LoRA.
        base: dtype of the frozen base: "float32", "bfloat16" or "nf4" (QLoRA).
        average: an EMA is kept.
        mixed_precision: adds the 16-bit copies that autocast keeps of whole weights ("casts"); FSDP2 and ZeRO-3 cast a block at a
            time and keep none.

    Raises ValueError for an unknown launch or base, or a base that is not float32 where nothing is frozen.
    """
    if launch not in SHARED or base not in BASE_BYTES:
        raise ValueError(f"launch must be one of {', '.join(SHARED)}, base one of {', '.join(BASE_BYTES)}")
    learns = num_parameters if trained is None else trained
    frozen = num_parameters - learns
    if frozen < 0 or processes < 1:
        raise ValueError(
            f"need trained <= num_parameters and processes >= 1, got {learns}, {num_parameters}, {processes}"
        )
    if not frozen and base != "float32":
        raise ValueError(f"base={base!r} is for frozen weights; those that learn are float32: set trained")
    parts = {
        "weights": 4 * learns + BASE_BYTES[base] * frozen,
        "gradients": 4 * learns,
        "optimizer": 8 * learns,
        "average": 4 * learns * average,
        "master": 4 * learns * (launch == "zero2"),  # DeepSpeed's own float32 copy of what it updates
        "casts": 2 * (learns + frozen * (base == "float32")) * (mixed_precision and launch in ("one", "ddp", "zero2")),
    }
    shared = {name: size / (processes if name in SHARED[launch] else 1) / GIB for name, size in parts.items()}
    return shared | {"total": sum(shared.values())}
