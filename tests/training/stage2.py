"""Stage 2 with small groups, two budgets, and every step in the log."""

from twigvlm.training.options import Stage2Config
from twigvlm.training.reinforce import train_stage2

# R̄ of the tiny model (16 visual tokens, 6 layers, K = 1, K_f = 5): R = 4 and 10
BUDGETS = (5.0, 9.0)


def settings(**changes):
    return Stage2Config(
        **{
            "batch_size": 4,
            "log_steps": 1,
            "group": 4,
            "budgets": BUDGETS,
            "learning_rate": 1e-2,
            "warmup": 0.0,
            **changes,
        }
    )


def run(model, dataset, directory, resume=False, callbacks=(), **options):
    return train_stage2(model, dataset, settings(**options), directory, resume, callbacks)
