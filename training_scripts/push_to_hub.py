"""Export a trained model with its code, so that it loads anywhere with `trust_remote_code=True`, and upload it.

    python training_scripts/push_to_hub.py outputs/quick_start/vmd-0 exported/vmd-d1
    python training_scripts/push_to_hub.py outputs/quick_start/vmd-0 exported/vmd-d1 --repo_id me/vmd-d1

The card, README.md, and results.json go along if they stand in the model's folder (`make_card.py` writes the card).
"""

import argparse
import sys


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a saved model.")
    parser.add_argument("folder", help="Where the export goes.")
    parser.add_argument("--repo_id", help="Hub repository to upload the folder to; created if missing.")
    parser.add_argument("--private", action="store_true")
    options = parser.parse_args(argv)

    from vmd_hf import VMDForMaskedDiffusion
    from vmd_hf.hub import check_model, copy_card, export_model, load_tokenizer, upload_folder

    check_model(options.model)
    model = VMDForMaskedDiffusion.from_pretrained(options.model)
    export_model(model, options.folder, load_tokenizer(options.model))
    copied = copy_card(options.model, options.folder)
    print(f"exported to {options.folder}, " + (f"with {' and '.join(copied)}" if copied else "no card was there"))
    if options.repo_id:
        print(upload_folder(options.folder, options.repo_id, private=options.private).commit_url)


if __name__ == "__main__":
    main(sys.argv[1:])
