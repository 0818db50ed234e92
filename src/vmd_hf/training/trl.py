"""TRL's `SFTTrainer` for masked diffusion: `pip install vmd-hf[trl]`."""

from transformers import Trainer

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("vmd_hf.training.trl needs the package trl: pip install 'vmd-hf[trl]'") from error


class VMDSFTTrainer(SFTTrainer):
    """`SFTTrainer` that prepares data as always, and trains the objective of the model's config.

    Tokenisation, chat templates, truncation and PEFT are TRL's. Prompts, and whatever else TRL leaves out of the loss,
    are context, which is never masked. The loss is that of the plain `Trainer`; TRL's own is next-token prediction, of
    which its `entropy` and `mean_token_accuracy` are, too: they are not logged. Arguments are those of `SFTTrainer`.

        trainer = VMDSFTTrainer(model, SFTConfig("out"), train_dataset=dataset, processing_class=tokenizer)

    Raises:
        ValueError: for a `loss_type` other than "nll", and for padding-free batches (the default of `packing=True`),
            in which TRL takes the first token of each text for context.
    """

    loss_is_scaled_for_ga = None
    compute_loss = Trainer.compute_loss
    prediction_step = Trainer.prediction_step

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.loss_type != "nll":
            raise ValueError(f'loss_type must be "nll", since the model has its own loss, got {self.args.loss_type!r}')
        if self.padding_free:
            raise ValueError(
                'padding_free must be False, and packing False or its packing_strategy "wrapped": batches without '
                "padding leave the first token of each text out of the loss"
            )


__all__ = ["VMDSFTTrainer"]
