"""What a training logged to TensorBoard."""

import warnings


def logged(directory):
    """Names of all figures below a directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = set()
    for file in directory.glob("**/events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        names.update(events.Tags()["scalars"])
    return names
