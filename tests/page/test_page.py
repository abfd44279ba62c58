"""The page in a real browser: `make test-page`. Screenshots go to the folder that PAGE_SHOTS names."""

import base64
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("playwright")

from playwright.sync_api import expect, sync_playwright

from tests.serving.servers import picture, served, slow_down, tiny_service
from twigvlm.config import PruningConfig
from twigvlm.serving.limits import Limits
from twigvlm.serving.service import Defaults

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
expect.set_options(timeout=30_000)
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def service():
    found = tiny_service(defaults=Defaults(PruningConfig(8, refocus=0.9), "tree"), limits=Limits(max_pixels=1_000_000))
    slow_down(found, 0.02)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def address(service):
    with served(service, stop_with_app=False) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(params=[{"width": 1200, "height": 900}, PHONE], ids=["desktop", "phone"])
def page(request, browser, address):
    made = browser.new_page(viewport=request.param)
    problems = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    made.goto(address)
    expect(made.locator("#model")).to_have_text("tiny")
    expect(made.locator("#question")).not_to_have_value("")
    made.set_default_timeout(30_000)
    yield made
    assert [text for text in problems if "status of 4" not in text] == []
    made.close()


def shoot(page, name):
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}-{page.viewport_size['width']}.png", full_page=True)


def test_at_first_sight_there_is_a_picture_a_question_and_examples(page):
    assert page.locator("#picture").evaluate("canvas => canvas.width") == 336
    assert page.locator("#examples img").count() == 3
    assert page.locator("#examples img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page is wider than the screen"
    )
    shoot(page, "start")


def test_an_answer_streams_by_origin_with_its_patches(page):
    page.locator("#length").fill("40")
    page.locator("#question").fill("what is there?")
    page.locator("#question").press("Enter")
    answer = page.locator(".answer")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(answer.locator("span").first).to_be_visible()
    expect(page.locator(".figures")).to_contain_text("40 tokens")
    assert answer.locator(".drafted").count() > 0
    assert answer.locator(".base").count() > 0
    expect(page.locator("#picture")).to_have_attribute("data-kept", "4")
    expect(page.locator(".figures")).to_contain_text("of 16 visual tokens")
    expect(page.locator("#send")).to_be_enabled()
    shoot(page, "answer")


def test_three_lanes_each_with_a_clock(page):
    page.locator("#length").fill("25")
    page.locator("#compare").click()
    expect(page.locator(".lane")).to_have_count(3)
    for lane in page.locator(".lane").all():
        expect(lane.locator(".figures")).to_contain_text("tokens")
        assert float(lane.locator(".clock").inner_text().split()[0]) > 0
    texts = page.locator(".answer").all_inner_texts()
    assert texts[0] == texts[1], "drafts change no answer"
    assert page.locator(".lane").first.locator(".drafted").count() == 0
    shoot(page, "lanes")


def test_the_slider_sets_the_budget(page, address):
    page.locator("#retain").focus()
    before = page.locator("#retain-value").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#retain-value").inner_text() == str(int(before) + 1)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.locator("#send").click()
    assert sent.value.post_data_json["retain"] == int(before) + 1
    expect(page.locator("#send")).to_be_enabled()


def test_a_picture_of_ones_own_and_a_file_that_is_none(page, tmp_path):
    from PIL import Image

    Image.new("RGB", (80, 40), "teal").save(tmp_path / "own.png")
    (tmp_path / "none.png").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "own.png")
    expect(page.locator("#picture")).to_have_js_property("width", 80)
    page.locator("#file").set_input_files(tmp_path / "none.png")
    expect(page.locator("#error")).to_contain_text("no picture")
    shoot(page, "error")


def test_the_same_file_may_be_chosen_twice(page, tmp_path):
    from PIL import Image

    for width in (80, 60):
        Image.new("RGB", (width, 40), "teal").save(tmp_path / "own.png")
        page.locator("#file").set_input_files(tmp_path / "own.png")
        expect(page.locator("#picture")).to_have_js_property("width", width)
        assert page.locator("#file").evaluate("input => input.files.length") == 0


def test_a_large_picture_is_sent_as_small_as_the_server_takes_it(page, tmp_path):
    from PIL import Image

    from twigvlm.images import load_image

    Image.effect_noise((2500, 2500), 90).convert("RGB").save(tmp_path / "large.png")
    page.locator("#file").set_input_files(tmp_path / "large.png")
    expect(page.locator("#picture")).to_have_js_property("width", 995)
    page.locator("#length").fill("3")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.locator("#send").click()
    url = sent.value.post_data_json["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert load_image(url).width * load_image(url).height <= 1_000_000
    expect(page.locator(".figures")).to_contain_text("tokens")


def test_files_may_be_dropped_anywhere(page):
    page.evaluate("""async () => {
        const response = await fetch("/examples/signs");
        const files = new DataTransfer();
        files.items.add(new File([await response.blob()], "signs.webp", { type: "image/webp" }));
        const drop = new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true });
        document.querySelector("#question").dispatchEvent(drop);
        window.left = !drop.defaultPrevented;
    }""")
    expect(page.locator("#hint")).to_contain_text("another picture")
    assert page.evaluate("window.left") is False


def test_a_new_picture_is_shown_without_the_patches_of_the_last_one(page, tmp_path):
    from PIL import Image

    Image.new("RGB", (80, 40), "teal").save(tmp_path / "own.png")
    page.locator("#length").fill("40")
    page.locator("#send").click()
    expect(page.locator(".answer span").first).to_be_visible()
    page.locator("#file").set_input_files(tmp_path / "own.png")
    expect(page.locator("#picture")).to_have_js_property("width", 80)
    expect(page.locator(".figures")).to_contain_text("chosen again")
    expect(page.locator("#picture")).to_have_attribute("data-kept", "")


def test_what_the_server_refuses_is_said_and_the_next_question_works(page):
    page.locator("#question").fill("<image>")
    page.locator("#send").click()
    expect(page.locator("#error")).to_contain_text("placeholder")
    page.locator("#question").fill("again")
    page.locator("#length").fill("3")
    page.locator("#send").click()
    expect(page.locator(".figures")).to_contain_text("3 tokens")
    expect(page.locator("#error")).to_be_empty()


def test_stop_hangs_up(page, service):
    page.locator("#length").fill("60")
    page.locator("#send").click()
    expect(page.locator(".answer span").first).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#send")).to_be_enabled()
    page.wait_for_timeout(300)
    assert "twigvlm_rows 0" in service.metrics.text()


def test_all_of_it_works_by_keyboard(page):
    # Not by the chooser itself, of which a browser without a screen does not always tell.
    page.locator("#file").evaluate("file => file.addEventListener('click', () => { document.title = 'asked'; })")
    page.locator("#drop").focus()
    page.keyboard.press("Enter")
    expect(page).to_have_title("asked")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    with page.expect_response("**/examples/signs"):
        page.keyboard.press("Enter")
    expect(page.locator("#question")).to_have_value("Read all signs from top to bottom.")


def let_go(page, held):
    """Let held requests have their answers, and the page some time to take them in."""
    for route in held:
        route.continue_()
    page.evaluate("""async () => {
        for (let frame = 0; frame < 20; frame += 1) await new Promise(requestAnimationFrame);
    }""")


def test_a_picture_that_comes_late_replaces_nothing(page):
    held = []
    page.route("**/examples/signs", lambda route: held.append(route))
    page.locator("#examples button").nth(1).click()
    page.locator("#file").set_input_files(
        {
            "name": "own.png",
            "mimeType": "image/png",
            "buffer": base64.b64decode(picture(size=(80, 40)).partition(",")[2]),
        }
    )
    expect(page.locator("#picture")).to_have_js_property("width", 80)
    let_go(page, held)
    expect(page.locator("#picture")).to_have_js_property("width", 80)


def test_the_first_example_leaves_a_question_that_is_there(page):
    held = []
    page.route("**/examples/scene", lambda route: held.append(route))
    page.reload()
    page.locator("#question").fill("my own?")
    let_go(page, held)
    expect(page.locator("#picture")).to_have_js_property("width", 336)
    expect(page.locator("#question")).to_have_value("my own?")


def test_text_of_an_answer_never_becomes_code(page):
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream",
        body='data: {"choices":[{"twigvlm":{"pieces":[{"text":"<img src=x onerror=alert(1)>","drafted":true}]}}]}\n\n',
    ))  # fmt: skip
    page.locator("#send").click()
    expect(page.locator(".answer")).to_have_text("<img src=x onerror=alert(1)>")
    expect(page.locator("#error")).to_contain_text("connection was lost")
    assert page.locator(".answer img").count() == 0
