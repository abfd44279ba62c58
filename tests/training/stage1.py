"""Stage 1 with few samples in a batch, every step in the log, and no P-Head unless a test asks for one."""

from twigvlm.training.distill import train_stage1
from twigvlm.training.options import Stage1Config


def run(model, dataset, directory, resume=False, callbacks=(), **options):
    config = Stage1Config(
        **{"batch_size": 4, "log_steps": 1, "learning_rate": 1e-3, "alpha": 0.0, "gamma": 0.0, **options}
    )
    return train_stage1(model, dataset, config, directory, resume, callbacks)
