"""What a call allocates, measured; and whether an estimate says so."""

from torch.profiler import ProfilerActivity, profile


def measured(call) -> int:
    """Bytes allocated at the worst moment, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def agree(estimate: int, peak: int, model, tolerance: float = 0.05) -> bool:
    """Within the tolerance, but for a processor's copy of a weight: oneDNN puts it into an order of its own for a product."""
    copy = max(weight.nbytes for weight in model.parameters())
    return (peak - copy) * (1 - tolerance) <= estimate <= peak * (1 + tolerance)
