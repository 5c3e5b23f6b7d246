"""Build Tiny ImageNet-10, on which RESULTS.md reports, from Tiny ImageNet's public archive (cs231n.stanford.edu):

    python tests/tiny_imagenet_10.py tiny-imagenet-200.zip FOLDER

FOLDER is then a DATASET: ten classes with 500 images to train on and 800 to test on, and 50,000 images without labels.
"""
import sys
from pathlib import Path
from zipfile import ZipFile

LIST = Path(__file__).with_name("tiny-imagenet-10.txt")  # a line a synset, a letter for each of its 500 training images


def build(archive: Path, folder: Path, list_of_images: Path = LIST) -> None:
    lines = [line.split() for line in list_of_images.read_text().splitlines() if not line.startswith("#")]
    with ZipFile(archive) as images:
        for synset, name, letters in lines:
            places = {"r": folder / "train" / name, "t": folder / "test" / name, "u": folder / "unlabeled"}
            for number, letter in enumerate(letters):
                if letter in places:
                    file = f"{synset}_{number}.JPEG"
                    places[letter].mkdir(parents=True, exist_ok=True)
                    content = images.read(f"tiny-imagenet-200/train/{synset}/images/{file}")
                    (places[letter] / file).write_bytes(content)


if __name__ == "__main__":
    build(*map(Path, sys.argv[1:3]))
