"""Stage 1: what it teaches, to whom, and how a run is kept and continued."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.tiny import IMAGE_TOKEN, prompt, tiny_llava
from tests.training.events import logged
from tests.training.stop import StopAt
from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigVLM
from twigvlm.pruning.methods.pruning_head import HeadScores, VisualQuery, log_visual_attention
from twigvlm.training.data.dataset import Collator, ConversationDataset, frequent_answer_tokens
from twigvlm.training.distill import Student, train_stage1
from twigvlm.training.options import Stage1Config
from twigvlm.training.teacher import resolve_teacher_layer

PLAIN = Stage1Config(alpha=0.0, gamma=0.0)


def copy(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def shallow_logits(model, item):
    """Reference: logits of one unpadded sample at all positions, step by step in plain sight."""
    prompt = model.base.prompt(input_ids=item["input_ids"], pixel_values=item.get("pixel_values"))
    inputs = model.base.token_inputs(prompt)
    masks = model.base.masks()
    hidden = model.base.run_layers(prompt.hidden, 0, model.twig.config.trunk_layers, inputs, masks)
    return model.twig.logits(model.twig(hidden, inputs, masks))[0]


def run(model, dataset, directory, resume=False, callbacks=(), **options):
    config = Stage1Config(
        **{"batch_size": 4, "log_steps": 1, "learning_rate": 1e-3, "alpha": 0.0, "gamma": 0.0, **options}
    )
    return train_stage1(model, dataset, config, directory, resume, callbacks)


def test_one_step_changes_the_whole_twig_and_nothing_else(make_model, dataset, tmp_path):
    model = make_model()
    base, twig = copy(model.model), copy(model.twig)
    run(model, dataset, tmp_path, max_steps=2, warmup=0.0)
    assert same(base, copy(model.model))
    after = copy(model.twig)
    assert all(not torch.equal(twig[name], after[name]) for name, _ in model.twig.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_loss_is_the_mean_over_answers_whatever_the_padding(make_model, dataset):
    model = make_model()
    items = [dataset[index] for index in range(4)]
    collate = Collator(pad_token_id=0)
    with torch.no_grad():
        together = Student(model, PLAIN)(**collate(items))["loss"]
        total, count = 0.0, 0
        for item in items:
            logits = shallow_logits(model, item)[:-1]
            targets = item["labels"][0, 1:]
            total += float(F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100))
            count += int((targets != -100).sum())
        split = sum(
            Student(model, PLAIN)(**collate([item]), num_items_in_batch=torch.tensor(count))["loss"] for item in items
        )
    assert float(together) == pytest.approx(total / count, rel=1e-5)
    assert float(split) == pytest.approx(total / count, rel=1e-5)


def test_a_reduced_vocabulary_ignores_what_it_cannot_draft(make_model, dataset, samples, processor):
    tokens = frequent_answer_tokens(samples, processor, 5)
    model = make_model(head="shared", draft_vocabulary=5, draft_token_ids=tokens)
    item = dataset[0]
    targets = item["labels"][0, 1:]
    inside = torch.isin(targets, tokens)
    assert 0 < inside.sum() < (answers := (targets != -100).sum())
    with torch.no_grad():
        logits = shallow_logits(model, item)[:-1][inside]
        rows = torch.tensor([tokens.tolist().index(token) for token in targets[inside].tolist()])
        loss = Student(model, PLAIN)(**item)["loss"]
    assert logits.shape[-1] == 5
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, rows, reduction="sum") / answers), rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_learns(make_model, dataset, tmp_path, attention):
    model = make_model()
    model.model.set_attn_implementation(attention)
    log = run(model, dataset, tmp_path, max_steps=40, batch_size=8, learning_rate=1e-2)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 40
    assert losses[-1] < 0.3 * losses[0]


def test_learning_rate_warms_up_and_follows_a_cosine(make_model, dataset, tmp_path):
    log = run(make_model(), dataset, tmp_path, max_steps=10, warmup=0.2)
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates[0] < rates[2] == max(rates)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1 * rates[2]


def test_optimiser_is_the_published_one(make_model, dataset, tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen.update(optimizer.param_groups[0], kind=type(optimizer.optimizer).__name__)

    run(make_model(), dataset, tmp_path, max_steps=1, callbacks=[Look()])
    assert seen["kind"] == "AdamW"
    assert seen["betas"] == (0.9, 0.98)
    assert seen["weight_decay"] == 0


def test_resumed_equals_uninterrupted(make_model, dataset, tmp_path):
    whole = make_model()
    run(whole, dataset, tmp_path / "whole", max_steps=5, batch_size=3, accumulate=1, save_steps=2)
    broken = make_model()
    run(broken, dataset, tmp_path / "parts", max_steps=5, batch_size=3, save_steps=2, callbacks=[StopAt(3)])
    assert not same(copy(whole.twig), copy(broken.twig))
    # a checkpoint that was cut off while it was written does not count
    (tmp_path / "parts" / "checkpoint-9").mkdir()
    resumed = make_model()
    log = run(resumed, dataset, tmp_path / "parts", resume=True, max_steps=5, batch_size=3, save_steps=2)
    assert max(entry["step"] for entry in log) == 5
    assert same(copy(whole.twig), copy(resumed.twig))


def test_checkpoints_hold_the_twig_only(make_model, dataset, tmp_path):
    model = make_model(head="shared")
    run(model, dataset, tmp_path, max_steps=1, save_steps=1)
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == {f"twig.{name}" for name in model.twig.state_dict()}


def test_resuming_with_other_settings_is_refused(make_model, dataset, tmp_path):
    run(make_model(), dataset, tmp_path, max_steps=2, save_steps=1)
    before = (tmp_path / "settings.json").read_text()
    assert json.loads(before)["twig_layers"] == 2
    with pytest.raises(TwigVLMError, match=r"twig_layers=1: the checkpoint in .* was trained with 2"):
        run(make_model(twig_layers=1), dataset, tmp_path, resume=True, max_steps=2, save_steps=1)
    with pytest.raises(TwigVLMError, match=r"learning_rate=0\.5"):
        run(make_model(), dataset, tmp_path, resume=True, max_steps=2, save_steps=1, learning_rate=0.5)
    with pytest.raises(TwigVLMError, match=r"dtype=torch.bfloat16: .* with torch.float32"):
        run(make_model(torch.bfloat16), dataset, tmp_path, resume=True, max_steps=2, save_steps=1)
    assert (tmp_path / "settings.json").read_text() == before
    run(make_model(), dataset, tmp_path, resume=True, max_steps=2, save_steps=5, gradient_checkpointing=True)


def test_a_bfloat16_base_trains_a_float32_twig_that_generates_afterwards(make_model, dataset, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    formats = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            formats.append({parameter.dtype for parameter in model.parameters()})

    log = run(model, dataset, tmp_path, max_steps=20, batch_size=8, learning_rate=1e-2, callbacks=[Look()])
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert formats[0] == {torch.float32}
    assert losses[-1] < 0.6 * losses[0]
    assert {parameter.dtype for parameter in model.twig.parameters()} == {torch.bfloat16}
    inputs = {key: value.to(torch.bfloat16) if key == "pixel_values" else value for key, value in prompt().items()}
    model.generate(**inputs, max_new_tokens=4, retain=8.0, speculate="chain")


def test_float16_is_refused(make_model, dataset, tmp_path):
    with pytest.raises(TwigVLMError, match="dtype=float16"):
        run(make_model(dtype=torch.float16), dataset, tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"batch_size": 0}, {"accumulate": 0}, {"epochs": 0.0}, {"learning_rate": -1.0}, {"warmup": 1.0},
        {"max_steps": 0}, {"save_steps": 0}, {"workers": -1}, {"learning_rate": float("nan")}, {"alpha": -0.1},
        {"gamma": float("inf")}, {"seed": -1}, {"temperature": 0.0}, {"clip": -1.0}, {"teacher_layer": 0},
    ],
)  # fmt: skip
def test_settings_are_checked(option):
    ((name, _),) = option.items()
    with pytest.raises(TwigVLMError, match=f"{name}="):
        Stage1Config(**option)


def test_epochs_count_steps(make_model, dataset, tmp_path):
    log = run(make_model(), dataset, tmp_path, epochs=2.0, batch_size=3)
    assert max(entry["step"] for entry in log) == 6  # 8 samples in batches of 3, twice


def test_samples_without_images_train_alone_and_beside_others(make_model, samples, processor):
    text = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}
    data = ConversationDataset([text, samples[0]], processor, strict=True)
    model, collate = make_model(), Collator(pad_token_id=0)
    shallow = Student(model, PLAIN)
    with torch.no_grad():
        alone = [shallow(**collate([data[index]]), num_items_in_batch=torch.tensor(1)) for index in range(2)]
        both = shallow(**collate([data[0], data[1]]), num_items_in_batch=torch.tensor(1))
        logits = shallow_logits(model, data[0])[:-1]
    expected = F.cross_entropy(logits, data[0]["labels"][0, 1:], reduction="sum", ignore_index=-100)
    assert float(alone[0]["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(both["loss"]) == pytest.approx(sum(float(one["loss"]) for one in alone), rel=1e-5)
    shallow(**collate([data[0]]))["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.twig.parameters())


def test_a_broken_picture_is_replaced_while_training_and_when_it_goes_on(make_model, samples, processor, tmp_path):
    samples[5]["image"] = str(tmp_path / "none.png")
    options = {"max_steps": 4, "batch_size": 2, "accumulate": 1, "save_steps": 2}
    whole = make_model()
    run(whole, ConversationDataset(samples, processor), tmp_path / "whole", **options)
    begun, resumed = make_model(), make_model()
    run(begun, ConversationDataset(samples, processor), tmp_path / "parts", callbacks=[StopAt(2)], **options)
    run(resumed, ConversationDataset(samples, processor), tmp_path / "parts", resume=True, **options)
    assert same(copy(whole.twig), copy(resumed.twig))


def full_loss(model, item, **options):
    """Every term of one unpadded sample with its gradient graph."""
    return Student(model, Stage1Config(**options))(**item)


def test_distillation_changes_the_p_head_too(make_model, dataset, tmp_path):
    model = make_model(pruning_head=True)
    base, twig = copy(model.model), copy(model.twig)
    log = run(model, dataset, tmp_path, max_steps=2, warmup=0.0, alpha=0.1, gamma=1.0)
    assert same(base, copy(model.model))
    after = copy(model.twig)
    assert all(not torch.equal(twig[name], after[name]) for name, _ in model.twig.named_parameters())
    first = log[0]
    expected = first["next_token"] + 0.1 * first["prediction_kl"] + first["attention_kl"]
    assert first["loss"] == pytest.approx(expected, rel=1e-3)


def test_terms_are_what_the_paper_says(make_model, dataset):
    model, item = make_model(pruning_head=True), dataset[1]  # two turns
    with torch.no_grad():
        terms = full_loss(model, item, teacher_layer=4, clip=1e9, temperature=2.0)
        eager = tiny_llava(attention="eager")(
            input_ids=item["input_ids"], pixel_values=item["pixel_values"], output_attentions=True
        )
        targets = item["labels"][0, 1:]
        real = targets != -100
        student = shallow_logits(model, item)[:-1][real]
        teacher = eager.logits[0, :-1][real]
        kl = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").sum(-1)
        assert float(terms["prediction_kl"]) == pytest.approx(float(kl.mean()) * 4 / 1e9, rel=1e-3)
        # attention of layer 4 at both turns' last prompt tokens, softmax over visual tokens alone
        queries = [index for index in range(len(targets)) if real[index] and not real[index - 1]]
        assert len(queries) == 2
        visual = item["input_ids"][0] == IMAGE_TOKEN
        rows = eager.attentions[3][0][:, queries][:, :, visual]
        teacher = (rows / rows.sum(-1, keepdim=True)).mean(0)
        scores = []

        def recorded(trunk):
            ranking = HeadScores()(trunk)
            scores.append(ranking[trunk.prompt.visual_mask])
            return ranking

        for query in queries:  # the P-Head of the prompt cut off after the question, as at inference
            asked = {"input_ids": item["input_ids"][:, : query + 1], "pixel_values": item["pixel_values"]}
            model.generate(**asked, keep=1, scorer=recorded, max_new_tokens=1)
        expected = F.kl_div(torch.stack(scores).log(), teacher, reduction="none").sum(-1).mean()
        assert float(terms["attention_kl"]) == pytest.approx(float(expected), rel=1e-3)
        loss = terms["next_token"] + 0.1 * terms["prediction_kl"] + terms["attention_kl"]
        assert float(terms["loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_passes_of_a_step_add_up_to_one_pass_of_all_its_samples(make_model, dataset):
    """Every answer token weighs the same, and every sample's turn, however long its answer is."""
    model, items = make_model(pruning_head=True), [dataset[0], dataset[4]]  # of one turn each
    items[1] = {key: value[:, :-4] if value.ndim == 2 else value for key, value in items[1].items()}
    counts = [int((item["labels"] != -100).sum()) for item in items]
    assert counts[0] > counts[1] > 0
    gradients = []
    for batch_size, passes in ((2, [items]), (1, [[item] for item in items])):
        student = Student(model, Stage1Config(batch_size=batch_size, accumulate=2 // batch_size))
        model.twig.zero_grad()
        for batch in passes:
            student(**Collator(0)(batch), num_items_in_batch=torch.tensor(sum(counts)))["loss"].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.twig.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_no_number_ends_the_run(make_model, dataset, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    with pytest.raises(
        TwigVLMError, match=r"loss=.* by step .*: the training diverged; .*lower learning rate than 1e\+30"
    ):
        run(model, dataset, tmp_path, max_steps=8, learning_rate=1e30, warmup=0.0)
    assert not model.training
    assert model.twig.norm.weight.dtype == torch.bfloat16


class Break(TrainerCallback):
    """Makes a weight NaN at one step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.twig.norm.weight[0] = float("nan")


@pytest.mark.parametrize(("steps", "saved"), [(1, []), (2, ["checkpoint-1"])])
def test_weights_that_are_not_finite_never_reach_a_checkpoint(make_model, dataset, tmp_path, steps, saved):
    model = make_model()
    with pytest.raises(
        TwigVLMError, match=f"NaN or infinite weights by step {steps}: the training diverged; .* than 0.001"
    ):
        run(model, dataset, tmp_path, max_steps=steps, save_steps=1, callbacks=[Break(steps)])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == saved
    assert not model.twig.record


def test_a_run_that_is_stopped_with_weights_that_are_not_finite_fails(make_model, dataset, tmp_path):
    with pytest.raises(TwigVLMError, match="NaN or infinite weights by step 2"):
        run(make_model(), dataset, tmp_path, max_steps=5, callbacks=[Break(2), StopAt(2)])


@pytest.mark.parametrize("stop", [[], [StopAt(3)]])
def test_the_last_step_is_logged_and_recorded(make_model, dataset, tmp_path, stop):
    model = make_model()
    log = run(model, dataset, tmp_path, max_steps=5 if stop else 3, log_steps=2, callbacks=stop)
    losses = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 3]
    (stage,) = model.twig.record
    assert stage["steps"] == 3
    assert stage["final"] == {name: losses[-1][name] for name in ("loss", "next_token")}


def test_a_run_that_was_finished_records_its_last_step_when_resumed(make_model, dataset, tmp_path):
    records = []
    for resume in (False, True):
        model = make_model()
        run(model, dataset, tmp_path, resume, max_steps=2, log_steps=50)
        records.append(model.twig.record)
    assert records[0] == records[1]
    assert records[0][0]["final"]["loss"] > 0


def test_growing_and_loading_under_inference_mode_makes_a_twig_that_trains(make_model, dataset, tmp_path):
    with torch.inference_mode():
        model = make_model(pruning_head=True)
        model.save_pretrained(tmp_path / "twig")
        loaded = TwigVLM.from_pretrained(tiny_llava(), tmp_path / "twig")
    for number, grown in enumerate((model, loaded)):
        before = copy(grown.twig)
        run(grown, dataset, tmp_path / str(number), max_steps=1, warmup=0.0, gamma=1.0)
        assert not any(torch.equal(before[name], tensor) for name, tensor in grown.twig.named_parameters())


def test_what_cannot_be_trained_under_inference_mode_is_refused(make_model, dataset, tmp_path):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(TwigVLMError, match=r"torch.inference_mode: nothing can be trained inside it"):
            run(make_model(), dataset, tmp_path / "out", max_steps=1)
    with torch.inference_mode():
        model = make_model(head="shared")
    with pytest.raises(TwigVLMError, match=r"base: was loaded inside torch.inference_mode"):
        run(model, dataset, tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out").exists()


def test_two_turns_teach_what_each_teaches_alone(make_model, dataset):
    model, both = make_model(pruning_head=True), dataset[1]
    labels = both["labels"][0]
    second = int((labels != -100).nonzero().max())
    while labels[second] != -100:
        second -= 1  # the last prompt token of the second turn
    end = int((labels[:second] != -100).nonzero().max()) + 1
    first_alone = {**both, "input_ids": both["input_ids"][:, :end], "labels": both["labels"][:, :end]}
    first_alone["attention_mask"] = both["attention_mask"][:, :end]
    second_alone = {**both, "labels": both["labels"].clone()}
    second_alone["labels"][:, :end] = -100
    with torch.no_grad():
        whole, one, two = (full_loss(model, item)["attention_kl"] for item in (both, first_alone, second_alone))
    assert float(one) != pytest.approx(float(two), rel=1e-3)
    assert float(whole) == pytest.approx(float(one + two) / 2, rel=1e-4)


def test_padding_teaches_nothing(make_model, dataset):
    model = make_model(pruning_head=True)
    items = [dataset[0], dataset[1]]
    with torch.no_grad():
        together = full_loss(model, Collator(pad_token_id=0)(items))
        alone = [full_loss(model, item) for item in items]
    turns = (1, 2)
    attention = sum(float(terms["attention_kl"]) * turn for terms, turn in zip(alone, turns, strict=True)) / 3
    assert float(together["attention_kl"]) == pytest.approx(attention, rel=1e-4)
    counts = [int((item["labels"] != -100).sum()) for item in items]
    prediction = sum(float(terms["prediction_kl"]) * count for terms, count in zip(alone, counts, strict=True))
    assert float(together["prediction_kl"]) == pytest.approx(prediction / sum(counts), rel=1e-4)


def test_a_reduced_vocabulary_learns_the_bases_shares_of_it(make_model, dataset):
    tokens = torch.tensor([5, 9, 30, 31])
    model, item = make_model(draft_vocabulary=4, draft_token_ids=tokens), dataset[0]
    with torch.no_grad():
        loss = full_loss(model, item, gamma=0.0, clip=1e9, temperature=1.0)["prediction_kl"] * 1e9
        real = item["labels"][0, 1:] != -100
        whole = model.model(input_ids=item["input_ids"], pixel_values=item["pixel_values"]).logits[0, :-1][real]
        shares = whole.softmax(-1)[:, tokens]
        shares = shares / shares.sum(-1, keepdim=True)
        student = shallow_logits(model, item)[:-1][real].log_softmax(-1)
    assert float(loss) == pytest.approx(float(F.kl_div(student, shares, reduction="none").sum(-1).mean()), rel=1e-3)


def test_the_p_head_learns_at_answer_tokens_too(make_model, dataset):
    """At every token that predicts one of an answer, but at the prompts' ends the weight is γ's."""
    model, item = make_model(pruning_head=True), dataset[1]
    with torch.no_grad():
        one = full_loss(model, item, alpha=0.0, gamma=0.0, teacher_layer=4)
        terms = full_loss(model, item, alpha=0.0, gamma=2.0, gamma_answers=0.5, teacher_layer=4)
        ends = full_loss(model, item, alpha=0.0, gamma=2.0, teacher_layer=4)
        prompt = model.base.prompt(input_ids=item["input_ids"], pixel_values=item["pixel_values"])
        inputs, masks = model.base.token_inputs(prompt), model.base.masks()
        hidden = model.base.run_layers(prompt.hidden, 0, 1, inputs, masks)
        labels = item["labels"][0]
        inside = [at for at in range(len(labels) - 1) if labels[at] != -100 and labels[at + 1] != -100]
        asking = torch.zeros_like(prompt.visual_mask)
        asking[0, inside] = True
        query = VisualQuery.at(asking, prompt.visual_mask)
        deep = model.base.run_layers(hidden, 1, 3, inputs, masks)
        wanted = log_visual_attention(model.base.layers[3], deep, inputs, query)
        last = model.twig.last_input(hidden, inputs, masks)
        got = log_visual_attention(model.twig.layers[-1], last, inputs, query, model.twig.pruning_head)
        expected = (wanted.exp() * (wanted - got)).sum(-1).mean()
    assert inside
    assert float(terms["answer_attention_kl"]) == pytest.approx(float(expected), rel=1e-3)
    assert float(terms["attention_kl"]) == pytest.approx(float(ends["attention_kl"]), rel=1e-5)
    total = one["loss"] + 2.0 * terms["attention_kl"] + 0.5 * terms["answer_attention_kl"]
    assert float(terms["loss"]) == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "deepest"), [({"alpha": 0.0, "gamma": 0.0}, 1), ({"alpha": 0.0}, 3), ({}, 6)]
)  # of layer 4 queries and keys
def test_the_teacher_runs_once_and_no_further_than_needed(make_model, dataset, options, deepest):
    model = make_model(pruning_head=True)
    student = Student(model, Stage1Config(teacher_layer=4, **options))
    calls = []
    for number, layer in enumerate(model.base.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    student(**dataset[0])
    assert calls == list(range(1, deepest + 1))


def test_what_cannot_be_taught_is_refused(make_model, dataset, tmp_path):
    with pytest.raises(TwigVLMError, match=r"gamma=1: .* has none.*pruning_head=True or set gamma=0"):
        run(make_model(), dataset, tmp_path / "out", gamma=1.0)
    with pytest.raises(TwigVLMError, match=r"gamma_answers=1: .* has none.*or set gamma_answers=0"):
        run(make_model(), dataset, tmp_path / "out", gamma_answers=1.0)
    for layer in (1, 7):
        with pytest.raises(TwigVLMError, match=f"teacher_layer={layer}: must be 2 to 6"):
            run(make_model(pruning_head=True), dataset, tmp_path / "out", gamma=1.0, teacher_layer=layer)
    assert not (tmp_path / "out").exists()


def test_the_teacher_is_at_five_eighths():
    assert [resolve_teacher_layer(None, layers, 2) for layers in (32, 30, 6, 3)] == [20, 19, 4, 3]


def test_a_bfloat16_base_distils_into_a_float32_twig(make_model, dataset, tmp_path):
    model = make_model(dtype=torch.bfloat16, pruning_head=True)
    log = run(model, dataset, tmp_path, max_steps=8, batch_size=4, learning_rate=1e-2, alpha=0.1, gamma=1.0)
    assert log[-2]["attention_kl"] < 0.7 * log[0]["attention_kl"]
    assert model.twig.pruning_head.key_gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradient_checkpointing_runs_layers_twice_for_the_same_gradients(make_model, dataset, dtype):
    gradients, calls = [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = make_model(dtype, pruning_head=True)
        model.twig.float()
        student = Student(model, Stage1Config(gradient_checkpointing=on)).train()
        runs = []
        for layer in model.twig.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        pixels = dataset[1]["pixel_values"].to(model.base.dtype)
        student(**{**dataset[1], "pixel_values": pixels})["loss"].backward()
        gradients.append({name: parameter.grad for name, parameter in model.twig.named_parameters()})
        calls.append(len(runs))
    assert calls == [2, 4]
    assert same(*gradients)


def test_tensorboard_has_every_term(make_model, dataset, tmp_path):
    run(make_model(pruning_head=True), dataset, tmp_path, max_steps=1, alpha=0.1, gamma=1.0, tensorboard=True)
    assert logged(tmp_path) >= {f"train/{name}" for name in ("loss", "next_token", "prediction_kl", "attention_kl")}


def test_a_directory_with_checkpoints_is_not_begun_anew(make_model, dataset, tmp_path):
    run(make_model(), dataset, tmp_path, max_steps=1)
    with pytest.raises(TwigVLMError, match="holds checkpoints; resume, or choose another directory"):
        run(make_model(), dataset, tmp_path, max_steps=1)
