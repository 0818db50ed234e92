"""The models that are ready to upload."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, AutoTokenizer

import vmd_hf  # noqa: F401, makes AutoModelForMaskedLM know the model
from vmd_hf.data.sudoku import generate_puzzles, parse_board, valid_boards

CARDS = Path(__file__).parents[1] / "model_cards"


@pytest.fixture
def sudoku():
    folder = CARDS / "vmd-sudoku"
    return AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("folder", sorted(path.name for path in CARDS.iterdir() if path.is_dir()))
def test_a_card_has_metadata_and_the_numbers_of_its_results_and_weights_are_small(folder):
    card = ModelCard.load(CARDS / folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert (CARDS / folder / "model.safetensors").stat().st_size <= 4_000_000
    for name, rows in json.loads((CARDS / folder / "results.json").read_text()).items():
        for row in rows:
            cells = f"{100 * row['solved']:.1f} % | {100 * row['low']:.1f} to {100 * row['high']:.1f} %"
            line = f"| {name} | {row['remasking']} | {row['num_steps']} | {row['puzzles']} | {cells} |"
            assert line in card.text


def test_five_lines_solve_a_puzzle(sudoku):
    model, tokenizer = sudoku
    puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    board = tokenizer.decode(model.generate(**tokenizer(puzzle, return_tensors="pt"))[0])
    assert valid_boards(parse_board(board)[None]).all()
    assert all(clue in (".", cell) for clue, cell in zip(puzzle, board, strict=True))


def test_the_solver_solves_what_it_has_not_seen(sudoku):
    model, tokenizer = sudoku
    puzzles, _ = generate_puzzles(20, (31, 36), seed=123)
    texts = ["".join(map(str, puzzle)) for puzzle in puzzles]
    ids = model.generate(**tokenizer(texts, return_tensors="pt"))  # 20 steps: 94 % of such puzzles
    assert sum(valid_boards([parse_board(text) for text in tokenizer.batch_decode(ids)])) >= 16
