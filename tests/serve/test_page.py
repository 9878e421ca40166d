"""The page's files: what they are sent with, who gets them, and that nothing in them leaves the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from m2lite.serve.web_page import PAGE_PATHS
from tests.serve.conftest import Serve, Served

FOLDER = Path(__file__).resolve().parents[2] / "m2lite" / "serve" / "page"
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def test_every_file_is_there() -> None:
    assert set(PAGE_PATHS) == {"/", *(f"/page/{each.name}" for each in FOLDER.iterdir())}
    assert {"index.html", "page.js", "page.css"} <= {each.name for each in FOLDER.iterdir()}


@pytest.mark.parametrize("path", PAGE_PATHS)
def test_headers(served: Served, path: str) -> None:
    answer = served.http.get(path, headers=BROWSER)
    name = path.rpartition("/")[2] or "index.html"
    assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"].partition(";")[0] == TYPES[name.rpartition(".")[2]]
    policy = dict(each.strip().partition(" ")[::2] for each in answer.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'",
        "img-src": "'self' data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_new_version_is_seen(served: Served) -> None:
    """A browser asks each time, and gets the file only where it has another."""
    first = served.http.get("/page/page.js")
    assert first.headers["cache-control"] == "no-cache"
    same = served.http.get("/page/page.js", headers={"if-none-match": first.headers["etag"]})
    assert same.status_code == 304 and same.content == b"" and same.headers["etag"] == first.headers["etag"]
    other = served.http.get("/page/page.js", headers={"if-none-match": '"0123"'})
    assert other.status_code == 200 and other.content == first.content


def test_other_programs_get_a_line(served: Served) -> None:
    for headers in ({}, {"accept": "*/*"}, {"accept": "application/json"}):
        answer = served.http.get("/", headers=headers)
        assert answer.headers["content-type"].startswith("text/plain") and "/v1/chat/completions" in answer.text
        assert answer.headers["vary"] == "Accept"
    assert served.http.head("/").status_code == 200


def test_the_page_needs_no_key_and_what_it_asks_does(serve: Serve) -> None:
    found = serve("reply", api_keys=("secret",))
    for path in PAGE_PATHS:
        assert found.http.get(path, headers=BROWSER).status_code == 200
    assert found.http.get("/page/other.js").status_code == 401
    assert found.http.get("/props").status_code == 401
    assert found.http.get("/props", headers={"authorization": "Bearer secret"}).status_code == 200


def test_no_other_paths(served: Served) -> None:
    for path in ("/page/", "/page/none.js", "/page/..%2fapp.py", "/page/../app.py", "/page/%2e%2e/app.py"):
        assert served.http.get(path).status_code == 404, path


def test_nothing_foreign_and_nothing_that_becomes_html() -> None:
    """The policy forbids it all; a page that tried would be broken."""
    sinks = "innerHTML|outerHTML|insertAdjacentHTML|document.write|DOMParser|eval\\(|new Function|srcdoc"
    for each in FOLDER.iterdir():
        text = each.read_text()
        assert not re.search(sinks, text), each.name
        assert re.findall(r"https?://[\w.]+", text) in ([], ["http://www.w3.org"]), each.name
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    named = re.findall(r"(?:src|href)=\"([^\"#]+)\"", html)
    imported = [name for each in FOLDER.glob("*.js") for name in re.findall(r"from \"\./([^\"]+)\"", each.read_text())]
    assert {*named, *(f"/page/{name}" for name in imported)} == {*PAGE_PATHS} - {"/", "/page/index.html"}
