"""Train a VMD, or with `--latent_size 0` its MDM baseline, with the plain Trainer.

    python training_scripts/train_vmd.py training_scripts/recipes/d1.yaml
    python training_scripts/train_vmd.py training_scripts/recipes/sotu.yaml --seed 1 --output_dir outputs/sotu-1
    python training_scripts/train_vmd.py training_scripts/recipes/sotu.yaml --resume_from_checkpoint true
    python training_scripts/train_vmd.py training_scripts/recipes/sotu_lora.yaml --lora_r 8
    accelerate launch --config_file training_scripts/accelerate_configs/gpu_8.yaml training_scripts/train_vmd.py ...

The recipe is a YAML file of the arguments that `--help` lists; what stands on the command line wins, `none` clears an
optional value there, and `--where` with nothing behind it an empty list. The model and its tokenizer are saved in
`--output_dir`; with `--lora_r`, an adapter of the model at `--model_name_or_path` is, which
`AutoModelForMaskedLM.from_pretrained` and the other scripts take for a model.

A new text model needs a tokenizer: `--tokenizer_size N` trains one on the training text, `--tokenizer NAME` takes that
of a folder or the Hub, `--tokenizer characters` reduces the text to 27 characters. A model that is given has its own.
"""

import sys

from vmd_hf.recipes import parse


def main(argv: list[str]) -> None:
    arguments = parse(argv)

    from vmd_hf.training_run import train  # and torch, which --help does without

    trainer = train(*arguments)
    trainer.accelerator.end_training()  # several processes take leave of one another


if __name__ == "__main__":
    main(sys.argv[1:])
