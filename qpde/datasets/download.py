"""Fetch the citation graphs for `load_planetoid`. A file that is not, bit for bit, the one named here never appears.

The names, and a SHA-256 for each, are those of the Planetoid repository at one commit, so a later change there, a
broken connection or another server cannot change what is read.
"""

from os import PathLike
from pathlib import Path

COMMIT = "af6abf468a772cc055bec88c52e4d6f51b7c37e3"
SOURCE = f"https://raw.githubusercontent.com/kimiyoung/planetoid/{COMMIT}/data"


def download_planetoid(name: str, root: str | PathLike[str], *, base_url: str = SOURCE, timeout: float = 30.0) -> Path:
    """Fetch the seven files ind.NAME.{y,allx,ally,tx,ty,graph,test.index} of a citation graph, with pooch.

    A file that is there and has the right SHA-256 is kept and not fetched again; any other of its name is replaced.
    Each file appears whole or not at all, so an interrupted call leaves what it had finished and can be repeated, and
    calls side by side do not disturb each other.

    Args:
      name: "cora", "citeseer" or "pubmed" (0.6, 1.0 and 8.7 MB).
      root: the folder to put the files in; made if it is missing.
      base_url: where the files lie.
      timeout: seconds without an answer before giving up.
    Returns:
      `root`, for `load_planetoid(name, download_planetoid(name, root))`.
    Raises:
      ValueError: an unknown name; the SHA-256 of what was fetched is another than the expected one, and nothing of it
        is kept.
      OSError: the server cannot be reached, has no such file or breaks off; the folder cannot be written.
      ImportError: pooch is missing.
    """
    if name not in CHECKSUMS:
        raise ValueError(f"`name` (={name!r}) must be one of {', '.join(CHECKSUMS)}")
    try:
        import pooch
    except ImportError as error:
        raise ImportError("files are fetched by pooch, which is missing: pip install pooch") from error
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    for part, expected in CHECKSUMS[name].items():
        file = f"ind.{name}.{part}"
        url, over_http = f"{base_url}/{file}", pooch.HTTPDownloader(timeout=timeout)
        try:
            pooch.retrieve(url, expected, fname=file, path=folder, downloader=over_http)
        except OSError as error:
            raise OSError(f"cannot fetch {url}: {error}; check the network, or bring the file by hand") from error
    return folder


CHECKSUMS: dict[str, dict[str, str]] = {
    "cora": {
        "y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
        "allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
        "ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
        "tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
        "ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
        "graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
        "test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    },
    "citeseer": {
        "y": "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
        "allx": "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
        "ally": "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
        "tx": "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
        "ty": "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
        "graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
        "test.index": "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    },
    "pubmed": {
        "y": "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
        "allx": "508e538e2abdccdd54c4d3e9f49d638b4af7107d85845f66ddea5a5152658b7e",
        "ally": "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
        "tx": "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
        "ty": "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
        "graph": "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
        "test.index": "b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5",
    },
}
