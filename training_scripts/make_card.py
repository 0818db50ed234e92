"""Write a model's card, README.md, from `card.yaml` and `results.json` in its folder.

    python training_scripts/make_card.py model_cards/vmd-d1

`card.yaml` says what cannot be measured: title, summary, usage, training, evaluation, limits, and metadata.
`results.json` holds what was measured: tables as `evaluate_vmd.py` writes them, lists of rows under a title. So no
number is typed by hand.
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Of the model, with card.yaml and results.json.")
    folder = parser.parse_args(argv).folder

    from vmd_hf.cards import write_card

    print(f"wrote {write_card(folder)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"make_card.py: {error}")
