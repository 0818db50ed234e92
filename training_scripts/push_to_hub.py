"""Export a trained model with its code, so that it loads anywhere with `trust_remote_code=True`, and upload it.

python training_scripts/push_to_hub.py outputs/quick_start/vmd-0 exported/vmd-d1
python training_scripts/push_to_hub.py outputs/quick_start/vmd-0 exported/vmd-d1 --repo_id me/vmd-d1
"""

import argparse
import sys

from vmd_hf import VMDForMaskedDiffusion
from vmd_hf.hub import export_model, load_tokenizer, upload_folder


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a saved model.")
    parser.add_argument("folder", help="Where the export goes.")
    parser.add_argument("--repo_id", help="Hub repository to upload the folder to; created if missing.")
    parser.add_argument("--private", action="store_true")
    options = parser.parse_args(argv)

    model = VMDForMaskedDiffusion.from_pretrained(options.model)
    export_model(model, options.folder, load_tokenizer(options.model))
    print(f"exported to {options.folder}")
    if options.repo_id:
        print(upload_folder(options.folder, options.repo_id, private=options.private).commit_url)


if __name__ == "__main__":
    main(sys.argv[1:])
