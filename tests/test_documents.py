"""What the documents say of the code is there, and what the site shows is complete."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from recipes.docs import errors, figures
from twigvlm.model import TwigVLM

ROOT = Path(__file__).parents[1]
INDEX = re.findall(r"`((?:src/|tests/)?[\w/]+\.py)(?:: ([^`]+))?`", (ROOT / "docs" / "paper_index.md").read_text())


def names_in(body):
    """What a module or a class defines, to where."""
    defined = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    assigned += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return defined | {target.id: target for target in assigned if isinstance(target, ast.Name)}


@pytest.mark.parametrize(("file", "names"), sorted(set(INDEX)))
def test_the_paper_s_index_leads_somewhere(file, names):
    path = ROOT / file if file.startswith("tests/") else ROOT / "src" / "twigvlm" / file
    found = names_in(ast.parse(path.read_text()).body)
    for name in re.findall(r"[\w.]+", re.sub(r"\(.*?\)", "", names)):
        outer, _, inner = name.partition(".")
        assert outer in found, name
        if inner:
            assert isinstance(found[outer], ast.ClassDef), name
            assert inner in names_in(found[outer].body), name


def test_the_index_was_read():
    assert len(INDEX) > 40


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path for path in (ROOT / "docs").rglob("*.md")}


def pages_in(entry):
    """The pages that an entry of the site's navigation leads to."""
    if isinstance(entry, str):
        return [entry]
    return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages_in(inner)]


def test_every_page_is_in_the_navigation():
    assert sorted(pages_in(SITE["nav"])) == sorted(PAGES)


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES.values()], ids=lambda path: path.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_members_that_the_documents_use_are_in_the_reference():
    used = {
        name
        for page in (ROOT / "README.md", *PAGES.values())
        for name in re.findall(
            r"\b(?:model|plain|TwigVLM(?:\.\w+\([^()]*(?:\([^()]*\))?[^()]*\))?)\.(\w+)\(", page.read_text()
        )
    }
    assert used >= {"generate", "save_pretrained", "push_to_hub", "print_trainable_parameters", "calibrate"}
    assert {name for name in used if not hasattr(TwigVLM, name)} == set()
    reference = PAGES["api/model.md"].read_text().partition("::: twigvlm.model.TwigVLM\n")[2].partition("\n:::")[0]
    options = yaml.safe_load(reference)["options"]
    inherited = {name for name in used if name not in vars(TwigVLM)}
    assert inherited
    assert options["inherited_members"] is True
    hidden = [pattern.removeprefix("!") for pattern in options["filters"]]
    assert [name for name in used if any(re.search(pattern, name) for pattern in hidden)] == []


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_figures_are_as_the_code_draws_them(name):
    assert (figures.FOLDER / name).read_text(encoding="utf-8") == figures.FIGURES[name]()


MESSAGES = {message: place for found in errors.by_area().values() for message, place in found.items()}


def test_every_message_is_listed():
    assert len(MESSAGES) > 300
    assert "retain=RETAIN and keep=KEEP: give only one of them" in MESSAGES
    section = errors.section()
    assert section.count("| <code>") == sum(len(found) for found in errors.by_area().values())


def test_messages_that_are_made_by_functions_and_constants_are_listed():
    (gated,) = (message for message in MESSAGES if "access is restricted" in message)
    assert gated.startswith("NAME: access is restricted; ask for it on its page")
    assert "lmms-eval is not installed; run: pip install 'twigvlm[lmms-eval]'" in MESSAGES
    assert MESSAGES[gated].startswith("checkpoints/hub.py:")


WITHOUT_REMEDY = {
    "a schema of LENGTH characters is longer than MAX_SCHEMA",
    "image_url: HOST answers with status STATUS",
    "image_url: HOST does not deliver it (…)",
    "image_url: HOST takes longer than SECONDS seconds",
    "image_url: the image has more than MAX_BYTES bytes",
    "messages.NUMBER: is no text in UTF-8",
    "messages: only users can show images, not the role ROLE",
    "METHOD URL: only POST /v1/chat/completions is answered",
    "model: this server has only NAME",
    "pruner: …",
    "response_format: the grammar library refuses it (REASON)",
    "the request has more than LIMIT bytes",
}
"""Messages that only state what is wrong. This list shrinks: a new message says what to do."""


def test_every_message_has_a_remedy():
    stating = {message: place for message, place in MESSAGES.items() if not errors.split(message)[1]}
    assert {message: place for message, place in stating.items() if message not in WITHOUT_REMEDY} == {}


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("run NAME: holds no task", ""),
        ("sliding window: the plug-in sees all tokens; a base without a window can be exported", ""),
        ("model: no such file; give another", "Give another."),
        ("inputs and input_ids: give only one of them", "Give only one of them."),
        ("a figure needs matplotlib; run: pip install 'twigvlm[report]'", "Run: pip install 'twigvlm[report]'"),
        ("max_rows=MAX_ROWS: must be 1 or more", "Give 1 or more."),
        ("batch_size=SIZE: must be 1 or more; automatic sizes are not supported", "Give 1 or more."),
        ("method NAME: must name τ, for example NAME:0.7", "Name τ, for example NAME:0.7."),
        ("data: question 3: KEY must be true or false", "KEY must be true or false."),
        (
            "final_wipe=FINAL_WIPE: at most TOTAL, the layers of this base",
            "Give at most TOTAL, the layers of this base.",
        ),
        ("response_format: needs json_schema", "It needs json_schema."),
        ("messages.NUMBER: ERROR", errors.AT_END),
        ("every question failed; …", errors.AT_END),
    ],
)
def test_what_a_message_says_to_do(message, remedy):
    assert errors.split(message)[1] == remedy


def test_texts_that_a_message_is_made_of(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        """
NEEDS = "a part is missing; run: pip install part"
def refuse(name, error, several):
    more = " and others" if several else ""
    changed = "one"
    changed += "two"
    raise TwigVLMError(f"{name}: broken{more} ({changed}, {error[0]}{error[1]}); {_way(error)}")
def _way(error) -> str:
    if error:
        return "repair it"
    return f"replace {error.part}"
def check():
    raise TwigVLMError(NEEDS)
"""
    )
    assert dict(reversed(list(errors.messages(source)))).keys() == {7, 13}
    assert {text for _, text in errors.messages(source)} == {
        *(
            f"NAME: broken{more} (CHANGED, …); {way}"
            for more in ("", " and others")
            for way in ("repair it", "replace PART")
        ),
        "a part is missing; run: pip install part",
    }


def test_messages_that_the_page_explains_exist():
    known = "\n".join(MESSAGES)
    explained = re.findall(r"^\*\*`([^`]+)`", (ROOT / "docs" / errors.PAGE).read_text(), re.MULTILINE)
    assert len(explained) > 8
    for message in explained:
        parts = [re.escape(part.strip(" …")) for part in message.split("…") if part.strip(" …:")]
        assert re.search(".*".join(parts), known), message
