"""Text in, token files out: collect text, train a byte-level BPE tokenizer on it, tokenize it once.

    python examples/llama/data.py FOLDER [TEXT_FILE_OR_FOLDER]     # compare.py does this by itself

Nothing is downloaded. The default text is the source code of the running Python's standard library: about 10 MB of
real text that every reader of this example already has.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
SEQUENCE = 256  # tokens in one example
END_OF_TEXT = "<|endoftext|>"
HOLD_OUT = 20  # one file in 20 is held out for validation
# Installed packages and the tests differ from one Python installation to the next, and the code page tables in
# `encodings` are numbers rather than code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


def find_files(source: Path | None) -> list[Path]:
    """Lists the text files of `source` (a file, a folder, or None for the standard library) in a fixed order."""
    if source is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts)]
    elif source.is_file():
        return [source]
    elif source.is_dir():
        found = [p for p in source.rglob("*") if p.is_file() and not p.name.startswith(".")]
    else:
        raise ValueError(
            f"--data {source}: no such file or folder. Give a text file, a folder of text files, or leave "
            "--data out to train on the source code of Python's standard library."
        )
    return sorted(found)


def read_texts(files: list[Path]) -> list[str]:
    """Reads the files that hold UTF-8 text and passes over the others (pictures, archives, other encodings)."""
    texts = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            texts.append(text)
    return texts


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Splits texts into training and validation.

    Whole files are held out, since two parts of one file resemble each other. With too few files for that, the end
    of each file is held out.
    """
    if len(texts) >= HOLD_OUT:
        train = [text for i, text in enumerate(texts) if i % HOLD_OUT != HOLD_OUT - 1]
        return train, texts[HOLD_OUT - 1 :: HOLD_OUT]
    cuts = [len(text) - len(text) // HOLD_OUT for text in texts]
    return [t[:cut] for t, cut in zip(texts, cuts)], [t[cut:] for t, cut in zip(texts, cuts)]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; every byte is in its vocabulary, so no text is out of reach."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Turns texts into one long row of token ids, with an end-of-text token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(texts):
        ids.extend(encoding.ids)
        ids.append(end)
    return np.array(ids, dtype=np.uint16)  # VOCAB_SIZE is below 65536


def prepare(source: Path | None, folder: Path) -> dict:
    """Writes tokenizer.json, train.npy, val.npy and info.json to `folder` and returns what info.json holds.

    Runs once: a folder already prepared from the same files is left as it is.
    """
    files = find_files(source)
    fingerprint: list = [VOCAB_SIZE] + [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    info_file, stamp_file = folder / "info.json", folder / "files.json"
    if info_file.exists() and stamp_file.exists() and json.loads(stamp_file.read_text()) == fingerprint:
        return json.loads(info_file.read_text())

    texts = read_texts(files)
    if not texts:
        raise ValueError(f"--data {source}: holds no UTF-8 text. Give a text file or a folder of text files.")
    train_texts, val_texts = split(texts)
    tokenizer = train_tokenizer(train_texts)  # the held-out text stays unseen by the tokenizer, too
    train, val = tokenize(tokenizer, train_texts), tokenize(tokenizer, val_texts)
    info = {
        "source": str(source or "the source code of Python's standard library"),
        "files": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "vocab_size": tokenizer.get_vocab_size(),
        "train_tokens": len(train),
        "val_tokens": len(val),
    }

    folder.mkdir(parents=True, exist_ok=True)
    stamp_file.unlink(missing_ok=True)  # written last: an interrupted run is not taken for a finished one
    tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "train.npy", train)
    np.save(folder / "val.npy", val)
    info_file.write_text(json.dumps(info, indent=2) + "\n")
    stamp_file.write_text(json.dumps(fingerprint))
    return info


def load_windows(folder: Path, name: str, batch_size: int) -> np.ndarray:
    """Loads train.npy or val.npy as windows of SEQUENCE tokens, and checks that they fill one batch."""
    file = folder / f"{name}.npy"
    if not file.exists():
        raise ValueError(
            f"{file}: not there. Prepare the data first: python {Path(__file__).parent / 'compare.py'} "
            "does it, or data.prepare(source, folder)."
        )
    tokens = np.load(file, mmap_mode="r")
    count = len(tokens) // SEQUENCE
    if count < batch_size:
        raise ValueError(
            f"{file}: {len(tokens)} tokens are too few for one batch of {batch_size} x {SEQUENCE} = "
            f"{batch_size * SEQUENCE} tokens. Give --data more text."
        )
    return tokens[: count * SEQUENCE].reshape(count, SEQUENCE)


def spread(windows: np.ndarray, most: int, ranks: int) -> np.ndarray:
    """At most so many windows, as many for each rank, evenly spaced: they come from all files."""
    count = min(most, len(windows)) // ranks * ranks
    return windows[np.linspace(0, len(windows) - 1, count).astype(int)]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    print(json.dumps(prepare(Path(sys.argv[2]) if len(sys.argv) == 3 else None, Path(sys.argv[1])), indent=2))
