"""Passwords and signatures in URLs: shown nowhere, and everything works with them all the same."""

import json
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import HTTPStore

from aioloader import BrokenDataError, DataLoader, Pipeline, StateError
from aioloader.core.safe_text import safe_repr, safe_repr_list
from aioloader.masking import mask_message, masked
from aioloader.sources import Files, Lines, Objects, ParquetRows, TarShards
from tests._servers import RETRY, HttpServer
from tests._support import Face, Steps, notes, on_both_faces
from tests.test_rewritten import archive

pytestmark = pytest.mark.usefixtures("fork_server")

SECRET = "s3cr3t"
SIGNED = (
    "https://bucket.s3.amazonaws.com/train/0001.jpg?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=s3cr3t%2F2026"
    "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=900&X-Amz-SignedHeaders=host&X-Amz-Signature=s3cr3t"
)


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("https://user:s3cr3t@host/a", "https://***@host/a"),
        ("https://s3cr3t@host/a", "https://***@host/a"),
        ("https://:s3cr3t@host:80/a", "https://***@host:80/a"),
        ("https://user:s3c@r3t@host/a?x=1", "https://***@host/a?x=1"),
        ("https://user:s3/cr?3t@host/a", "https://***@host/a"),
        ("https%3A%2F%2Fuser%3As3cr3t%40host/a", "https%3A%2F%2F***@host/a"),
        ("'https://user:s3cr3t@host', 'https://host/b@c'", "'https://***@host', 'https://host/b@c'"),
        ("got https://user:s3cr3t-and-cut-o", "got https://***@"),
        (SIGNED, SIGNED.replace("s3cr3t%2F2026", "***").replace("s3cr3t", "***")),
        ("k%3FX-Amz-Signature%3Ds3cr3t%26x%3D1", "k%3FX-Amz-Signature%3D***%26x%3D1"),
        ("https://a.blob/c/b?sv=1&sp=r&sig=s3cr3t%2Bs3cr3t%3D", "https://a.blob/c/b?sv=1&sp=r&sig=***"),
        ("https://a.com/o?GoogleAccessId=me&Expires=1&Signature=s3cr3t", None),
        ("https://d.cloudfront.net/o?Policy=s3cr3t__&Signature=s3cr3t&Key-Pair-Id=s3cr3t", None),
        ("https://h/o?AWSAccessKeyId=s3cr3t&Signature=s3cr3t&Expires=1", None),
        ("https://h/o?access_token=s3cr3t", None),
        ("https://h/o?a=1;token=s3cr3t#id_token=s3cr3t", None),
        ("https://h/o?api_key=s3cr3t&apikey=s3cr3t&password=s3cr3t&pwd=s3cr3t&auth=s3cr3t&jwt=s3cr3t", None),
        ("https://h/o?key=s3cr3t-s3cr3t-s3cr3t-s3cr3t", "https://h/o?key=***"),
    ],
)
def test_what_a_secret_is(url: str, seen: str | None) -> None:
    assert masked(url) == seen if seen is not None else SECRET not in masked(url)
    assert masked(masked(url)) == masked(url)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/a@b",
        "https://host:8080",
        "('http://127.0.0.1:80', 3)",
        "https://host/get?key=train/0001.jpg&versionId=3&page=2",
        "https://host/a?design=1&author=me&max_tokens=5&assignment=3&monkey=4&email=a@b.c",
        "s3://bucket/a b/c=d/e@f",
        "file:///data/a:b@c",
        "user:password@host is no URL",
        "stage map(fetch), key 3, epoch 0, position 3",
    ],
)
def test_what_names_a_sample_is_none(text: str) -> None:
    assert masked(text) == text


def test_what_is_shown_is_masked_before_it_is_cut_off() -> None:
    """Afterwards nobody could tell where a password begins, or ends."""
    url = f"https://user:{SECRET * 99}@host/a?token={SECRET * 99}"
    assert safe_repr(url, 80) == "'https://***@host/a?token=***'"
    assert SECRET not in safe_repr({"urls": [url] * 9}, 80)
    assert SECRET not in safe_repr_list([url] * 9)


def test_it_takes_no_longer_than_the_text_is_long() -> None:
    for part in ("x", "a-", "https://a:", "=", "//", "&a=", "%3A", "s3cr3t@"):
        began = time.process_time()
        masked(f"{part * 20_000}=//")
        assert time.process_time() - began < 5


# -- notes -------------------------------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """All that a log would have of it, but for the user's own words."""
    return f"{error!r}\n{error}\n{notes(error)}"


def fails(url: str) -> Any:
    raise OSError("no")


async def fails_later(url: str) -> Any:
    raise OSError("no")


def odd(url: str) -> Any:
    return torch.zeros(len(url))


class Urls:
    """A dataset that is asked for by URL."""

    def __getitem__(self, url: str) -> torch.Tensor:
        raise OSError("no")

    def __len__(self) -> int:
        return 4


KEYS = [SIGNED, f"{SIGNED}&x=1", "https://user:s3cr3t@host/a", "https://host/a?token=s3cr3t"]


@on_both_faces
@pytest.mark.parametrize(
    "make",
    [
        lambda: Pipeline(KEYS).map(fails),
        lambda: Pipeline(KEYS).map(fails_later).batch(4),
        lambda: Pipeline(KEYS).map(fails, executor="process").batch(2),
        lambda: Pipeline(KEYS).map(fails).in_process(),
        lambda: Pipeline(KEYS).map(odd).batch(4),
        lambda: Pipeline.merge(Pipeline(KEYS).map(fails), Pipeline(KEYS)),
        lambda: DataLoader(Urls(), sampler=KEYS, batch_size=2),
        lambda: DataLoader(Urls(), sampler=KEYS, batch_size=2, num_workers=1, worker_type="process"),
        lambda: DataLoader(Urls(), sampler=KEYS, batch_size=None),
    ],
)
def test_notes_name_the_sample_and_not_its_secret(make: Any, face: Face) -> None:
    loader = make()
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    errors = [outcome for outcome in found if isinstance(outcome, Exception)]
    assert errors
    for error in errors:
        assert SECRET not in told(error), told(error)
        assert "aioloader: " in notes(error)
    assert "https://bucket.s3.amazonaws.com/train/0001.jpg" in notes(errors[0])
    loader.close()


@on_both_faces
def test_what_a_store_says_of_a_url(http_server: HttpServer, face: Face) -> None:
    """The error is the store's own, and it is we who ask it."""
    http_server.files = {"there": b"1"}
    base = f"{http_server.url.replace('//', '//user:s3cr3t@')}/?sig=s3cr3t"
    store = HTTPStore(base, client_options={"allow_http": True}, retry_config=RETRY)
    for loader in (
        Pipeline(Objects(store, ["there?X-Amz-Signature=s3cr3t", "not"])),
        Pipeline(Objects(store, ["there", "there"], ranges=[(0, 1), (0, 9)])),
        Pipeline(Objects(store, prefix="x")),
        Pipeline(TarShards("not.tar", store=store)),
    ):
        with Steps(loader, face) as steps:
            errors = [outcome for outcome in steps.outcomes() if isinstance(outcome, Exception)]
        assert errors
        for error in errors:
            assert SECRET not in told(error), told(error)
        del errors, error
    del store, loader


@on_both_faces
def test_archives_by_a_url_with_a_password(http_server: HttpServer, face: Face) -> None:
    """No sample, key, error or state has it; and a state goes on with another one."""
    http_server.files = {"0.tar": archive(b"A", 3), "1.tar": archive(b"A", 3)[:2000]}

    def loader(password: str) -> Pipeline:
        base = http_server.url.replace("//", f"//user:{password}@")
        return Pipeline(TarShards(f"{base}/{{0..2}}.tar", retry_config=RETRY))

    first = loader("s3cr3t")
    with Steps(first, face) as steps:
        sample = steps.next()
        assert sample["__url__"] == http_server.url.replace("//", "//***@") + "/0.tar"
        state = json.dumps(first.state_dict())
        info = repr(first.last_batch_info())
        rest = steps.outcomes()
    errors = [outcome for outcome in rest if isinstance(outcome, Exception)]
    assert [type(error) for error in errors] == [BrokenDataError, FileNotFoundError]
    for text in (str(sample), state, info, *map(told, errors)):
        assert SECRET not in text
    second = loader("an0ther")
    second.load_state_dict(json.loads(state))
    with Steps(second, face) as steps:
        found = steps.outcomes()
    assert [sample["__key__"] for sample in found[:2]] == ["0001", "0002"]
    assert len(found) == len(rest)
    del errors, rest, found, first, second


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda url: Pipeline(url),
        lambda url: DataLoader(url),
        lambda url: Files(f"{url}?x=1"),
        lambda url: Files(url, watch=True),
        lambda url: Files([f"{url}?x=1"]),
        lambda url: Lines([f"{url}?x=1"]),
        lambda url: ParquetRows([f"{url}?x=1"]),
        lambda url: TarShards(f"{url}?x=1"),
        lambda url: TarShards(f"pipe:curl {url}"),
        lambda url: Objects(url, ["a"]),
        lambda url: Objects(HTTPStore("http://host"), url),
        lambda url: Objects(HTTPStore("http://host"), ["a"], ranges=url),
    ],
)
@pytest.mark.parametrize("url", [SIGNED, f"https://user:{SECRET * 30}@host/a.tar"])
def test_a_refusal_shows_no_secret(make: Any, url: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        make(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("source", [Files, Lines, ParquetRows, TarShards])
@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("mirror/https://user:s3cr3t@host/*.x", "'mirror/https://***@host/*.x'"),
        ("0001.jpg?X-Amz-Signature=s3cr3t&b=*", "'0001.jpg?X-Amz-Signature=***&b=*'"),
    ],
)
def test_a_glob_that_matches_nothing_shows_no_secret(source: Any, path: str, shown: str) -> None:
    """Downloads are kept by their URLs, so a path may hold one."""
    if source is TarShards and "://" in path:
        pytest.skip("it is a URL there")
    for paths in (path, [path]):
        with pytest.raises(FileNotFoundError, match="no file matches the glob") as caught:
            source(paths)
        assert SECRET not in told(caught.value)
        assert shown in str(caught.value)


def test_our_own_errors_have_no_secret_whatever_is_in_them() -> None:
    for kind in (BrokenDataError, StateError):
        assert str(kind(f"got {SIGNED}", 3)) == str(kind(masked(f"got {SIGNED}"), 3))


def test_what_is_written_beside_a_cache_has_none(tmp_path: Path) -> None:
    list(Pipeline(KEYS).cache(disk=tmp_path / "cache"))
    assert SECRET not in (tmp_path / "cache" / "cache.json").read_text()


@pytest.mark.parametrize("source", [Files, Lines, ParquetRows, TarShards])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://bucket/*.x", r"looks up no globs in stores, got 's3://bucket/\*\.x'; pass the names"),
        ("hf://datasets/x", r"does not know hf://, got 'hf://datasets/x'; .*\(pip install 'aioloader\[objects\]'\)"),
        (Path("s3://b/x"), "takes URLs as str, got 's3:/b/x', from which pathlib has taken a slash; pass it as a str"),
        ("https://host/x?a=1", "takes URLs without a query"),
        ("pipe:curl x", "runs no commands"),
    ],
)
def test_a_url_that_cannot_be_read_says_what_can(source: Any, url: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"{source.__name__} {why}"):
        source(url)


def test_a_url_cannot_be_watched() -> None:
    with pytest.raises(ValueError, match="takes a folder or glob of this machine, got the URL 's3://bucket/x'"):
        Files("s3://bucket/x", watch=True)


def test_a_file_may_have_the_name_of_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:" / "x.txt").write_bytes(b"1\n")
    assert list(Pipeline(Lines("s3://x.txt"))) == ["1"]


def test_the_cause_of_an_error_is_masked_too() -> None:
    """Also what obstore says for those who debug it."""
    error = ValueError("https://bob:s3cr3t@host/a")
    error.__cause__ = ValueError('Url { password: Some("s3cr3t"), host: "host" }')
    error.__cause__.__context__ = KeyError("http://host/a?X-Amz-Signature=s3cr3t")
    mask_message(error)
    assert "s3cr3t" not in f"{error}{error.__cause__}{error.__cause__.__context__}"


def test_parquet_from_a_store_shows_no_password() -> None:
    """Whatever obstore says of the request."""
    options = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    store = HTTPStore("http://bob:s3cr3t@127.0.0.1:1", **options)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="HEAD") as caught:
        next(iter(Pipeline(ParquetRows(["a.parquet"], store=store))))
    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))
