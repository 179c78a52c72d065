"""What a call allocates, measured."""

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
