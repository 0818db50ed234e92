"""What can be asked of an evaluation."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvaluationArguments:
    """What to evaluate, and how."""

    model: str = field(default="outputs/d1", metadata={"help": "Folder or Hub id of the model."})
    task: Literal["synthetic", "text", "sudoku", "boards"] = "synthetic"
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator if there is one, else cpu."})
    setting: str = "d1"
    correlation: float | None = None
    source: str = field(default="sotu", metadata={"help": "Text as in training, whose test split is read."})
    text_column: str = "text"
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    documents: Literal["joined", "packed", "separate"] = field(
        default="joined", metadata={"help": "How they become rows, as in training."}
    )
    where: list[str] = field(
        default_factory=list,
        metadata={"help": "Documents to select: president=Lincoln ...; nothing behind it selects all."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read no more than `num_documents` of the source's train and test split."}
    )
    num_documents: int = field(default=1000, metadata={"help": "Documents at the start of a stream's splits."})
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    temperatures: list[float] = field(
        default_factory=list, metadata={"help": "At which texts are sampled; default: the model's own."}
    )
    num_samples: int = field(default=100_000, metadata={"help": "Samples of a synthetic setting."})
    batch_size: int = 10_000
    num_texts: int = field(default=32, metadata={"help": "Texts to sample."})
    baseline: str | None = field(
        default=None, metadata={"help": "Model to compare bounds with; default: the one that an adapter is for."}
    )
    judge: str | None = field(default=None, metadata={"help": "Autoregressive model that reads the samples."})
    featuriser: str | None = field(
        default=None, metadata={"help": "Model for MAUVE between test rows and samples, of which it needs thousands."}
    )
    bound: Literal["per_sample", "per_step"] = field(default="per_step", metadata={"help": "See vmd_hf.nelbo."})
    order: Literal["random", "left_to_right", "top_prob", "top_prob_margin", "entropy"] = field(
        default="random", metadata={"help": "In which the sampler of a bound reveals tokens; see vmd_hf.nelbo."}
    )
    num_draws: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Importance samples of z in a bound (IWAE)."}
    )
    num_eval_rows: int = field(default=1000, metadata={"help": "Rows of text, taken evenly from the test split."})
    puzzles: str | None = field(default=None, metadata={"help": "File of Sudoku puzzles; default: new ones."})
    num_puzzles: int = field(default=1000, metadata={"help": "New puzzles to make, or taken evenly from the file."})
    min_clues: int = 31
    max_clues: int = 36
    num_clues: list[int] = field(
        default_factory=lambda: [0, 8, 16, 24], metadata={"help": "Clues of boards with many solutions."}
    )
    num_attempts: int = field(default=1, metadata={"help": "Attempts at a Sudoku whose board breaks a rule."})
    resample_latents: bool | None = field(
        default=None, metadata={"help": "A latent for each step, or a shared one (synthetic, boards); default: both."}
    )
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16 (autocast)."})
    remasking: list[str] = field(default_factory=lambda: ["top_prob", "top_prob_margin"])
    seed: int = 0
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file; default: results.json in the model's folder. Tables that it has under other titles "
            "stay; one of the same title is an error without --overwrite."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace tables of the same title in the output."})


__all__ = ["EvaluationArguments"]
