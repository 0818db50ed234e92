"""Sudoku boards: whether they keep the rules, and the clues."""

import datasets
import evaluate
import numpy as np

from vmd_hf.data.sudoku import group_validity, parse_board, valid_boards
from vmd_hf.metrics import PAPER_CITATION

_DESCRIPTION = """Share of boards that are complete and repeat no digit in a row, column or box; shares of rows,
columns and boxes that hold each digit once; number of distinct boards; and, with puzzles as references, the share of
boards that are valid and keep all clues."""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of boards, 81 characters each; 0, ".", "_" and "*" are empty cells.
    references: the puzzles that they should solve, written the same way; all empty for none.
Returns:
    valid, valid_rows, valid_columns, valid_boxes, distinct; and solved, kept_clues (shares).
Examples:
    >>> vmd_hf.metrics.load("sudoku_validity").compute(predictions=[board], references=[puzzle])["solved"]
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SudokuValidity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=PAPER_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, **kwargs):
        boards = np.stack([parse_board(text) for text in predictions])
        puzzles = np.stack([parse_board(text) for text in references])
        valid = valid_boards(boards)
        rows, columns, boxes = group_validity(boards).mean(0)
        kept = ((puzzles == 0) | (puzzles == boards)).all(1)
        return {
            "valid": float(valid.mean()),
            "valid_rows": float(rows),
            "valid_columns": float(columns),
            "valid_boxes": float(boxes),
            "distinct": len(np.unique(boards, axis=0)),
            "kept_clues": float(kept.mean()),
            "solved": float((valid & kept).mean()),
        }
