"""Stage 1: what each sample teaches, against losses that are computed in plain sight, and how far the teacher runs."""

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import IMAGE_TOKEN, tiny_llava
from tests.training.weights import same
from twigvlm.pruning.methods.pruning_head import HeadScores, VisualQuery, log_visual_attention
from twigvlm.training.data.dataset import Collator, ConversationDataset, frequent_answer_tokens
from twigvlm.training.distill import Student
from twigvlm.training.options import Stage1Config
from twigvlm.training.teacher import resolve_teacher_layers

PLAIN = Stage1Config(alpha=0.0, gamma=0.0)


def shallow_logits(model, item):
    """Reference: logits of one unpadded sample at all positions, step by step in plain sight."""
    prompt = model.base.prompt(input_ids=item["input_ids"], pixel_values=item.get("pixel_values"))
    inputs = model.base.token_inputs(prompt)
    masks = model.base.masks()
    hidden = model.base.run_layers(prompt.hidden, 0, model.twig.config.trunk_layers, inputs, masks)
    return model.twig.logits(model.twig(hidden, inputs, masks))[0]


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


def full_loss(model, item, **options):
    """Every term of one unpadded sample with its gradient graph."""
    return Student(model, Stage1Config(**options))(**item)


@pytest.mark.parametrize("layers", [(4,), (5, 3)], ids=["one-layer", "the-mean-of-two"])
def test_terms_are_what_the_paper_says(make_model, dataset, layers):
    model, item = make_model(pruning_head=True), dataset[1]  # two turns
    with torch.no_grad():
        terms = full_loss(model, item, teacher_layers=layers, clip=1e9, temperature=2.0)
        eager = tiny_llava(attention="eager")(
            input_ids=item["input_ids"], pixel_values=item["pixel_values"], output_attentions=True
        )
        targets = item["labels"][0, 1:]
        real = targets != -100
        student = shallow_logits(model, item)[:-1][real]
        teacher = eager.logits[0, :-1][real]
        kl = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").sum(-1)
        assert float(terms["prediction_kl"]) == pytest.approx(float(kl.mean()) * 4 / 1e9, rel=1e-3)
        # attention of these layers at both turns' last prompt tokens, softmax over visual tokens alone
        queries = [index for index in range(len(targets)) if real[index] and not real[index - 1]]
        assert len(queries) == 2
        visual = item["input_ids"][0] == IMAGE_TOKEN
        rows = torch.cat([eager.attentions[layer - 1][0] for layer in layers])[:, queries][:, :, visual]
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
    for passes in ([items], [[item] for item in items]):
        student = Student(model, Stage1Config())
        model.twig.zero_grad()
        for batch in passes:
            totals = {"num_items_in_batch": torch.tensor(sum(counts)), "samples_in_step": torch.tensor(2)}
            student(**Collator(0)(batch), **totals)["loss"].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.twig.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gammas", [(1.0, 0.0), (0.0, 1.0)], ids=["prompts", "answers"])
def test_samples_with_pictures_weigh_the_same_beside_samples_without(make_model, samples, processor, gammas):
    """However the samples of a step are dealt out to its passes."""
    text = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}
    data = ConversationDataset([samples[0], text, samples[4], text], processor, strict=True)
    model, items = make_model(pruning_head=True), [data[index] for index in range(4)]
    count = torch.tensor(sum(int((item["labels"] != -100).sum()) for item in items))
    totals = {"num_items_in_batch": count, "samples_in_step": torch.tensor(4)}
    gradients = []
    for size, order in ((4, (0, 1, 2, 3)), (2, (0, 1, 2, 3)), (2, (0, 2, 1, 3)), (1, (0, 1, 2, 3))):
        gamma, gamma_answers = gammas
        student = Student(model, Stage1Config(gamma=gamma, gamma_answers=gamma_answers))
        model.twig.zero_grad()
        for start in range(0, 4, size):
            batch = [items[place] for place in order[start : start + size]]
            student(**Collator(0)(batch), **totals)["loss"].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.twig.named_parameters()})
    for others in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-6)


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
        one = full_loss(model, item, alpha=0.0, gamma=0.0)
        terms = full_loss(model, item, alpha=0.0, gamma=2.0, gamma_answers=0.5, teacher_layers=(4,))
        ends = full_loss(model, item, alpha=0.0, gamma=2.0, teacher_layers=(4,))
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
    ("options", "deepest"),
    [
        ({"alpha": 0.0, "gamma": 0.0}, 1),
        ({"alpha": 0.0, "teacher_layers": (4,)}, 3),
        ({"teacher_layers": (4,)}, 6),
    ],
)  # of layer 4 queries and keys
def test_the_teacher_runs_once_and_no_further_than_needed(make_model, dataset, options, deepest):
    model = make_model(pruning_head=True)
    student = Student(model, Stage1Config(**options))
    calls = []
    for number, layer in enumerate(model.base.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    student(**dataset[0])
    assert calls == list(range(1, deepest + 1))


def test_the_teacher_is_at_five_eighths():
    assert [resolve_teacher_layers(None, layers, 2) for layers in (32, 30, 6, 3)] == [(20,), (19,), (4,), (3,)]


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
