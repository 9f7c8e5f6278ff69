"""``make demo``: a sentence encoder with its trained weights, optimized, verified, used and measured.

Everything is written to ``out/demo``. The commands that are shown can be repeated and changed by hand.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import onnxruntime

import mmopt
from benchmarks.zoo import ZOO
from benchmarks.zoo.inputs import Inputs
from benchmarks.zoo.sentences import tokenize
from mmopt.errors import MmoptError, VerifyError

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = "all-minilm-l6"
TOLERANCE = 1e-4

SENTENCES = (
    "A small dog is asleep in the sun.",
    "A puppy is napping outside.",
    "How do I reset my password?",
    "I cannot log in any more.",
    "Share prices fell sharply today.",
    "The stock market dropped at noon.",
    "Slice the onions and fry them gently.",
    "Bake the cake in the oven for an hour.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0, or the exit code of the step that failed.
    """
    options = _parser().parse_args(arguments)
    try:
        demonstrate(pathlib.Path(os.path.relpath(options.output.resolve(), ROOT)), options.time)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def demonstrate(output: pathlib.Path, seconds: float) -> None:
    """All steps.

    Args:
        output: Folder for all files, relative to the project.
        seconds: Time to measure each contender for.

    Raises:
        MmoptError: The model cannot be had here, or answers differ.
        subprocess.CalledProcessError: A command failed.
    """
    inputs = tokenize(SENTENCES, ZOO[MODEL].sizes["tokens"])
    recorded, artifact = output / "sentences.npz", output / "minilm.mmopt"
    _step(1, "Export all-MiniLM-L6-v2, a sentence encoder with its trained weights, from torch to ONNX")
    model = _export(output, len(SENTENCES))
    np.savez(ROOT / recorded, **inputs)
    print(f"{model} takes {len(SENTENCES)} sentences of up to {inputs['input_ids'].shape[1]} tokens.")
    _step(2, "Rewrite it, check every rewrite, compile it for this machine, and verify the result")
    _mmopt("optimize", model, "-o", artifact, "--inputs", recorded)
    _step(3, "Compare the artifact with the exported model once more, on the same sentences")
    _mmopt("verify", artifact, model, "--inputs", recorded)
    _step(4, "Use it: what is nearest in meaning to each sentence?")
    compare_answers(_by_artifact(ROOT / artifact, inputs), _by_onnxruntime(ROOT / model, inputs))
    _step(5, "Measure it in turns with onnxruntime on the exported model")
    measured = ["--rounds", "6", "--time", f"{seconds:g}", "--starts", "2", "--json", output / "bench.json"]
    _mmopt("bench", artifact, "--against", "onnxruntime", "--model", model, "--inputs", recorded, *measured)
    print(f"\nAll files are in {output}; `mmopt inspect {artifact}` tells more about the artifact.")


def _export(output: pathlib.Path, batch: int) -> pathlib.Path:
    """The exported model's path, relative to the project."""
    # The loader reports weights of a pooling layer that the encoder does not use; nobody needs to know here.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    return ZOO[MODEL].export(ROOT / output / "models", batch=batch).relative_to(ROOT)


def _by_artifact(artifact: pathlib.Path, inputs: Inputs) -> np.ndarray:
    with mmopt.load_artifact(artifact) as session:
        return np.asarray(session.run(inputs)["sentence_embedding"])


def _by_onnxruntime(model: pathlib.Path, inputs: Inputs) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(str(model)).run(["sentence_embedding"], dict(inputs))[0])


def compare_answers(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Print the nearest other sentence to each, and its cosine similarity by both.

    Args:
        ours: Embeddings of length 1 by the artifact, ``[sentences, width]``.
        theirs: The same by onnxruntime.

    Raises:
        VerifyError: A similarity differs by more than :data:`TOLERANCE`.
    """
    similar, expected = (np.asarray(rows @ rows.T) for rows in (ours, theirs))
    width = max(map(len, SENTENCES))
    print(f"{'sentence':{width}}  {'nearest':{width}}   mmopt  onnxruntime")
    for i, sentence in enumerate(SENTENCES):
        j = int(np.argmax(np.where(np.arange(len(SENTENCES)) == i, -np.inf, similar[i])))
        print(f"{sentence:{width}}  {SENTENCES[j]:{width}}  {similar[i, j]:.4f}       {expected[i, j]:.4f}")
    error = float(np.abs(similar - expected).max())
    if not error <= TOLERANCE:
        raise VerifyError(f"a similarity differs by {error:.1e} from onnxruntime's", where=MODEL)
    print(f"Largest difference between any two similarities: {error:.1e}")


def _mmopt(*arguments: object) -> None:
    """Show a command and run it."""
    words = [str(argument) for argument in arguments]
    print(f"$ mmopt {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "mmopt.cli.main", *words], cwd=ROOT, check=True)


def _step(number: int, title: str) -> None:
    print(f"\n{number}. {title}\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=pathlib.Path, default=ROOT / "out" / "demo", metavar="FOLDER")
    parser.add_argument("--time", type=float, default=3.0, metavar="SECONDS", help="measured time (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
