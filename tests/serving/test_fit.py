"""A client that asks for no budget is never refused for the server's, nor left with next to nothing of its pictures."""

import json
from types import SimpleNamespace

import pytest
from transformers import LlavaImageProcessor

from tests.serving.servers import chat, picture, served, tiled_service, tiny_model, tiny_service
from tests.serving.test_hostile import connect, post
from twigvlm.config import PruningConfig, TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import average_kept, average_scouted
from twigvlm.pruning.cut import average_visual
from twigvlm.pruning.methods import METHODS, make_pruner
from twigvlm.pruning.methods.fitprune import FitPrune
from twigvlm.serving.fit import check_possible, fitted
from twigvlm.serving.page import page_settings
from twigvlm.serving.service import Defaults

TWIG = TwigConfig(trunk_layers=2, twig_layers=3, final_wipe=24)


def kept(pruning, visual, twig=TWIG):
    return fitted(pruning, visual, 32, twig).keep


@pytest.mark.parametrize("images", range(1, 20))
def test_half_of_the_budget_is_kept_at_least(images):
    visual = 576 * images
    assert kept(PruningConfig(retain=64), visual) >= 32
    assert kept(PruningConfig(retain=64, scout=True), visual) >= 32
    assert kept(PruningConfig(retain=64, final_wipe=3, final_share=0.1), visual) >= 32


def test_a_budget_that_is_possible_is_as_it_was():
    keep = kept(PruningConfig(retain=192), 576)
    assert average_kept(keep, 576, 32, 2, 24) == pytest.approx(192, abs=0.5)
    keep = kept(PruningConfig(retain=192, scout=True), 576)
    assert average_scouted(keep, 576, 32, 2) == pytest.approx(192, abs=0.5)
    fastv = PruningConfig(retain=192, pruner="fastv:2")
    for pruning in (fastv, PruningConfig(keep=64, diverse=True), PruningConfig()):
        assert fitted(pruning, 576, 32, TWIG) == pruning


def test_other_options_stay():
    pruning = fitted(
        PruningConfig(retain=64, final_wipe=20, final_share=0.5, diverse=True, refocus=0.7), 1728, 32, TWIG
    )
    assert (pruning.final_wipe, pruning.final_share, pruning.diverse, pruning.refocus) == (20, 0.5, True, 0.7)


@pytest.mark.parametrize("options", [{"retain": 600}, {"keep": 576}, {"retain": 576, "pruner": "fastv:2"}])
def test_a_picture_that_is_no_larger_than_the_budget_stays_whole(options):
    assert fitted(PruningConfig(**options), 576, 32, TWIG) == PruningConfig()


def test_a_budget_above_what_final_wipe_leaves_keeps_all_until_then():
    assert kept(PruningConfig(retain=500), 576) == 576


def test_another_method_gets_the_smallest_budget_that_keeps_half_of_it():
    found = fitted(PruningConfig(retain=64, pruner="fastv:2"), 1728, 32, TWIG)
    cuts = make_pruner("fastv:2").cuts(found.retain, 1728, 32)
    assert cuts[0].keep == 32
    assert average_visual(cuts, 1728, 32) == pytest.approx(found.retain, abs=0.5)


@pytest.mark.parametrize(
    "pruning", [PruningConfig(retain=8), PruningConfig(retain=8, pruner="fastv:2"), PruningConfig(keep=8)]
)
def test_several_images_are_answered_under_the_server_s_budget(pruning):
    service = tiny_service(tiny_model(), defaults=Defaults(pruning))
    with served(service) as address:
        for images, most in ((0, 0), (1, 8), (3, 8)):
            status, body = post(address, chat(images=[picture()] * images, max_completion_tokens=2))
            assert status == 200, body
            counts = body["usage"]["prompt_tokens_details"]
            assert counts["visual_tokens"] == 16 * images
            assert most / 2 <= counts["kept_visual_tokens"] <= most
        status, body = post(address, chat(images=[picture()] * 3, retain=8))
        assert (status, "retain=8: must be" in body["error"]["message"]) == (400, True)


def test_a_server_s_own_files_are_asked_for_without_their_place(tmp_path):
    FitPrune(kept=(0.5,) * 5).save_pretrained(tmp_path)
    service = tiny_service(defaults=Defaults(PruningConfig(retain=8, pruner=f"fitprune:{tmp_path}")))
    settings = page_settings(service, needs_key=False)
    assert str(tmp_path) not in json.dumps(settings)
    body = chat(images=[picture()]) | {"retain": 8, "fit_budget": True} | settings["pruning"]
    with served(service) as address:
        assert post(address, body)[0] == 200
        status, told = post(address, {**body, "pruner": f"fitprune:{tmp_path}"})
        assert (status, told["error"]["param"]) == (400, "pruner")
        for options in ({}, {"keep": 5}):
            status, told = post(address, {**chat(images=[picture()]), "pruner": "fitprune", **options})
            assert (status, str(tmp_path) in json.dumps(told)) == (400, False)
            assert "fitprune" in told["error"]["message"]


def test_an_impossible_option_of_a_request_does_not_cost_its_connection():
    with served(tiny_service()) as address:
        connection = connect(address)
        for _ in range(2):
            body = chat(images=[picture()]) | {"retain": 8, "final_wipe": 1, "fit_budget": True}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            assert (response.status, "final_wipe=1" in response.read().decode()) == (400, True)
        connection.close()


def test_what_is_impossible_is_refused_at_the_start():
    base = SimpleNamespace(num_layers=32, attention="sdpa")
    for final_wipe in (0, 33):
        with pytest.raises(TwigVLMError, match=f"final_wipe={final_wipe}: must be 3 to 32"):
            check_possible(PruningConfig(retain=64, final_wipe=final_wipe), base, TWIG)


@pytest.mark.parametrize("retain", [16, 700])
def test_the_page_offers_the_server_s_own_budget(retain):
    service = tiled_service()
    service.defaults = Defaults(PruningConfig(retain=retain))
    found = page_settings(service, needs_key=False)["retain"]
    service.stop()
    assert found["low"] <= retain <= found["high"]


@pytest.mark.parametrize(
    ("options", "square"), [({}, "inner"), ({"do_pad": True}, "outer"), ({"do_center_crop": False}, None)]
)
def test_the_page_is_told_which_square_the_model_sees(options, square):
    service = tiny_service()
    size = service.processor.image_processor.size
    service.processor.image_processor = LlavaImageProcessor(size=size, crop_size=size, **options)
    found = page_settings(service, needs_key=False)
    service.stop()
    assert found["square"] == square


@pytest.mark.parametrize(
    "method",
    [
        *sorted({*METHODS} - {"fitprune", "random"}),
        "random:0",
        "random:2",
        "dart:published",
        "sparsevlm:published:compacted",
    ],
)
def test_what_is_possible_is_not_refused_at_the_start(method):
    base = SimpleNamespace(num_layers=32, attention="sdpa")
    check_possible(PruningConfig(retain=64, pruner=method), base, TWIG)
    check_possible(PruningConfig(retain=64, refocus=0.7), base, TWIG)
