"""What passes cost at a published size, on a tiny model."""

from recipes import published_size


def test_every_system_and_every_pass_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(published_size, "BUDGETS", (400.0,))
    monkeypatch.setattr(published_size, "NEW", 3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    monkeypatch.setattr(published_size, "DECODER", {**published_size.DECODER, **sizes, "num_hidden_layers": 8})
    monkeypatch.setattr(published_size, "TOWER", {**published_size.TOWER, **sizes, "num_hidden_layers": 2})
    published_size.main(published_size.Options(device="cpu", repeats=1))
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [name for name in names if name and not name.startswith("---")] == [
        "HF generate, sdpa",
        "own loop",
        "pruning, R̄ = 400",
        "pass over n tokens, ms",
        "draft",
        "verify",
    ]
