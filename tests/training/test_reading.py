import base64
import json

import datasets
import pytest
import torch

from twigvlm.errors import TwigVLMError
from twigvlm.training.data.dataset import ConversationDataset
from twigvlm.training.data.load import SHOWN, load_samples
from twigvlm.training.data.samples import BrokenSample


@pytest.fixture
def files(tmp_path, samples):
    """The samples on disk: images in `pictures`, conversations not yet written."""
    (tmp_path / "pictures").mkdir()
    for sample in samples:
        name = f"pictures/{sample['id']}.png"
        sample["image"].save(tmp_path / name)
        sample["image"] = name
    return tmp_path


@pytest.fixture
def same(processor):
    """Check that loaded samples give the same inputs as the first of those in memory."""

    def check(loaded, wanted):
        found = ConversationDataset(loaded, processor, strict=True)
        for index in range(len(found)):
            assert all(torch.equal(found[index][key], value) for key, value in wanted[index].items())

    return check


def test_file_and_directory(dataset, files, samples, same):
    (files / "a.json").write_text(json.dumps(samples[:5]))
    (files / "b.jsonl").write_text("\n".join(json.dumps(sample) for sample in samples[5:]) + "\n")
    assert [sample["id"] for sample in load_samples(files)] == [f"s{number}" for number in range(8)]
    loaded = load_samples(files / "a.json")
    assert len(loaded) == 5
    assert loaded[0]["images"] == [str(files / "pictures" / "s0.png")]
    same(loaded, dataset)
    elsewhere = files / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.json").write_text(json.dumps(samples))
    assert load_samples(elsewhere / "c.json", images=files)[0]["images"] == loaded[0]["images"]


def test_bad_files(files, samples):
    def refused(words, **options):
        with pytest.raises(TwigVLMError, match=words) as caught:
            load_samples(files / "a.json", **options)
        assert "\n" not in str(caught.value)

    refused("no such file or directory")
    (files / "a.json").write_text('[{"id":')
    refused("not readable as JSON")
    (files / "a.json").write_text("[" * 100_000)
    refused("not readable as JSON")
    (files / "a.json").write_bytes(b"\xff\xfe\x00")
    refused("cannot be read as text .*; save it as UTF-8")
    (files / "a.json").write_text('{"id": 3}')
    refused("put the samples in a list")
    (files / "a.json").write_text("[]")
    refused("holds no samples")
    (files / "a.json").write_text(json.dumps(samples))
    refused("no such directory", images=files / "none")
    (files / "pictures" / "s3.png").unlink()
    refused(r"sample 's3': no image file .*s3\.png", strict=True)
    (files / "a.json").write_text(json.dumps(samples[3:4]))
    refused(r"all 1 samples are broken; sample 's3': no image file")
    with pytest.raises(TwigVLMError, match=r"no \.json, \.jsonl or \.parquet file"):
        load_samples(files / "pictures")


def test_a_stray_file_among_samples_is_named_with_a_remedy(files, samples):
    (files / "a.json").write_text(json.dumps(samples))
    for content, problem in (('{"settings": 3}', "holds one JSON dict"), ("[", "not readable as JSON")):
        (files / "stray.json").write_text(content)
        with pytest.raises(TwigVLMError, match=rf"stray\.json.*: {problem}.*, or move the file out of this directory"):
            load_samples(files)


def test_a_broken_line_is_named(files, samples):
    lines = [json.dumps(samples[0]), "", '{"conversations":']
    (files / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(TwigVLMError, match=r"a\.jsonl': line 3: not readable as JSON"):
        load_samples(files / "a.jsonl")


def test_a_digest_tells_samples_apart_by_their_order_ids_and_texts(files, samples):
    def digest(changed):
        (files / "a.json").write_text(json.dumps(changed))
        return load_samples(files / "a.json").digest

    renamed = [{**samples[0], "id": "other"}, *samples[1:]]
    turns = [samples[0]["conversations"][0], {"from": "gpt", "value": "It is pink."}]
    reworded = [{**samples[0], "conversations": turns}, *samples[1:]]
    assert len({digest(each) for each in (samples, samples[::-1], samples[1:], renamed, reworded)}) == 5
    assert digest(samples) == digest(samples)


def test_a_line_separator_in_a_text_ends_no_line(files, samples):
    samples[0]["conversations"][1]["value"] = "one\u2028two"
    (files / "a.jsonl").write_text(json.dumps(samples[0], ensure_ascii=False), encoding="utf-8")
    assert load_samples(files / "a.jsonl")[0]["messages"][1]["content"][0]["text"] == "one\u2028two"


def test_broken_samples_are_left_out_and_reported(files, samples, caplog):
    texts = [{"conversations": samples[0]["conversations"]}] * (SHOWN + 3)
    samples[4]["image"] = ["pictures/s0.png", "pictures/s1.png"]
    (files / "pictures" / "s5.png").unlink()
    (files / "a.json").write_text(json.dumps([*texts, None, *samples]))
    loaded = load_samples(files / "a.json")
    assert [sample["id"] for sample in loaded] == ["s0", "s1", "s2", "s3", "s6", "s7"]
    assert len(caplog.messages) == SHOWN + 2
    assert caplog.messages[1].startswith("skipped sample 1: turn 0 holds more places for images")
    assert caplog.messages[SHOWN:] == [
        "further broken samples are skipped without a line each",
        f"skipped {SHOWN + 6} of {SHOWN + 12} samples",
    ]
    caplog.clear()
    (files / "a.json").write_text(json.dumps([sample for sample in samples if sample["id"] != "s4"]))
    assert len(load_samples(files / "a.json")) == 6
    assert "sample 's5': no image file" in caplog.messages[0]
    with pytest.raises(BrokenSample, match="sample 's5': no image file"):
        load_samples(files / "a.json", strict=True)


def test_data_uris_are_pictures_and_addresses_are_broken(dataset, files, samples, same, caplog):
    for sample in samples[:2]:
        data = base64.b64encode((files / sample["image"]).read_bytes()).decode()
        sample["image"] = f"data:image/png;base64,{data}"
    samples[1]["image"] = [{"bytes": None, "path": samples[1]["image"]}]
    samples[7]["image"] = "https://example.org/cat.jpg"
    samples[6]["image"] = "a" * 5000 + ".png"
    (files / "a.json").write_text(json.dumps(samples))
    same(load_samples(files / "a.json"), dataset)
    assert "sample 's6': no image file" in caplog.messages[0]
    assert "sample 's7': turn 0 has the remote image 'https://example.org/cat.jpg'; download it" in caplog.messages[1]


def test_samples_keep_their_number_as_name(files, samples):
    for sample in samples:
        del sample["id"]
    samples[1]["image"] = "none.png"
    (files / "a.json").write_text(json.dumps(samples))
    assert [sample["id"] for sample in load_samples(files / "a.json")] == [0, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("several", [False, True])
def test_hugging_face_data_sets(tmp_path, samples, dataset, same, several, caplog):
    columns = {key: [sample[key] for sample in samples] for key in ("id", "conversations")}
    if several:
        columns["images"] = [[sample["image"]] for sample in samples]
    else:
        columns["image"] = [sample["image"] for sample in samples]
    table = datasets.Dataset.from_dict(columns)
    feature = table.features["images" if several else "image"]
    assert isinstance(feature.feature if several else feature, datasets.Image)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        loaded = load_samples(path)
        assert len(loaded) == 8
        assert isinstance(loaded[0]["images"][0], bytes)
        same(loaded, dataset)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(TwigVLMError, match="holds the splits train; name the directory of one"):
        load_samples(tmp_path / "splits")
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(TwigVLMError, match="not readable as a data set"):
        load_samples(tmp_path / "a.parquet")


def test_a_corrupt_picture_in_a_decoding_data_set_breaks_its_sample_only(samples, processor, dataset):
    """A data set that decodes as it is read, and so fails before the sample is known."""
    columns = {key: [sample[key] for sample in samples] for key in ("id", "conversations")}
    columns["image"] = [{"bytes": b"nothing", "path": None}, *(sample["image"] for sample in samples[1:])]
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    found = ConversationDataset(table, processor)
    assert all(torch.equal(found[0][key], value) for key, value in dataset[1].items())
