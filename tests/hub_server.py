"""A local server that speaks as much of the Hub's protocol as uploads, downloads and listings need.

Standard library only. Point a fresh process at it: `subprocess.run(..., env=os.environ | server.environment(home))`,
because huggingface_hub reads its address when it is imported.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "user"
NOW = "2026-01-01T00:00:00.000Z"
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".parquet", ".arrow")
LFS_SIZE = 10_000_000

Files = dict[str, str]  # path in the repository -> sha256 of the content


@dataclass
class Commit:
    oid: str
    title: str
    files: Files


@dataclass
class Repository:
    kind: str  # model, dataset or space
    name: str  # owner/name
    private: bool
    commits: list[Commit]
    references: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit oid

    def find(self, revision: str) -> Commit:
        oid = self.references.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, "RevisionNotFound", f"no revision {revision} in {self.name}")


class HubError(Exception):
    """An answer with an error code of the Hub."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Reply:
    status: int = 200
    content: Any = None  # bytes, or what becomes JSON
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    host: str
    body: bytes
    query: dict[str, list[str]]
    headers: Any

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class HubServer:
    """The server; use it as a context manager. `repositories` and `requests` are for assertions."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()  # those that are accepted; all of them while empty
        self.uploads_before_cut: int | None = None  # then the connection is cut in the middle of large files
        self._contents: dict[str, bytes] = {}
        self._large: set[str] = set()
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        repository = r"(?P<repo>[^/]+/[^/]+)"
        kinds = r"(?P<kind>models|datasets|spaces)"
        self._routes: list[tuple[re.Pattern[str], Callable[..., Reply]]] = [
            (re.compile(pattern), handler)
            for pattern, handler in (
                (r"/api/whoami-v2", self._whoami),
                (r"/api/validate-yaml", lambda request: Reply(content={"errors": [], "warnings": []})),
                (r"/api/repos/create", self._create),
                (rf"/(?:{kinds}/)?{repository}\.git/info/lfs/objects/batch", self._lfs_batch),
                (r"/lfs/verify", lambda request: Reply(content={})),
                (r"/lfs/(?P<oid>[0-9a-f]{64})", self._lfs_upload),
                (rf"/api/{kinds}/{repository}/preupload/(?P<revision>[^/]+)", self._preupload),
                (rf"/api/{kinds}/{repository}/commit/(?P<revision>[^/]+)", self._commit),
                (rf"/api/{kinds}/{repository}/branch/(?P<revision>[^/]+)", self._branch),
                (rf"/api/{kinds}/{repository}/tag/(?P<revision>[^/]+)", self._tag),
                (rf"/api/{kinds}/{repository}/refs", self._references),
                (rf"/api/{kinds}/{repository}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", self._tree),
                (rf"/api/{kinds}/{repository}/paths-info/(?P<revision>[^/]+)", self._paths_info),
                (rf"/api/{kinds}/{repository}(?:/revision/(?P<revision>[^/]+))?", self._info),
                (rf"/(?:{kinds}/)?{repository}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._resolve),
            )
        ]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Return the variables that make a new process use this Hub, with its caches under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_local",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def cuts(self, method: str, path: str) -> bool:
        """Whether the connection breaks while this request sends its body."""
        if method != "PUT" or self.uploads_before_cut is None:
            return False
        with self._lock:
            self.requests.append(f"CUT {path}")
            self.uploads_before_cut -= 1
            return self.uploads_before_cut < 0

    def answer(self, path: str, request: Request) -> Reply:
        with self._lock:
            self.requests.append(f"{request.method} {path}")
            token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
            if self.tokens and token not in self.tokens and request.method != "PUT":
                raise HubError(401, "Unauthorized", f"Invalid credentials: {token}")
            for pattern, handler in self._routes:
                if found := pattern.fullmatch(path):
                    return handler(request, **found.groupdict())
        raise HubError(404, "NotFound", path)

    # Accounts and repositories

    def _whoami(self, request: Request) -> Reply:
        if not request.headers.get("Authorization"):
            raise HubError(401, "Unauthorized", "no token")
        token = {"displayName": "local", "role": "write"}
        return Reply(
            content={"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}
        )

    def _create(self, request: Request) -> Reply:
        wanted = request.json()
        kind = wanted.get("type") or "model"
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if wanted.get("organization") not in (None, USER):
            raise HubError(403, "Forbidden", f"You may not create a repository below {wanted['organization']}")
        prefix = "" if kind == "model" else f"{kind}s/"
        content = {"url": f"{self.url}/{prefix}{name}", "name": name, "id": "1"}
        if (kind, name) in self.repositories:
            return Reply(409, content | {"error": f"You already created this {kind} repo"})
        first = Commit(_sha1(name.encode()), "initial commit", {".gitattributes": self._store(b"")})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repositories[kind, name] = Repository(kind, name, private, [first], {"main": first.oid})
        return Reply(content=content)

    def _find(self, kind: str | None, repo: str) -> Repository:
        found = self.repositories.get(((kind or "models").removesuffix("s"), repo))
        if found is None:
            raise HubError(404, "RepoNotFound", f"Repository {repo} not found")
        return found

    def _store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self._contents[oid] = content
        return oid

    # Uploads

    def _preupload(self, request: Request, kind: str, repo: str, revision: str) -> Reply:
        self._find(kind, repo)
        files = []
        for file in request.json()["files"]:
            sample = base64.b64decode(file.get("sample") or "")
            large = file["path"].endswith(LFS_ENDINGS) or b"\0" in sample or file["size"] > LFS_SIZE
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        return Reply(content={"files": files})

    def _lfs_batch(self, request: Request, kind: str | None, repo: str) -> Reply:
        self._find(kind, repo)
        objects = []
        for item in request.json()["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self._contents:
                upload = {"href": f"{self.url}/lfs/{item['oid']}", "header": {}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/lfs/verify", "header": {}}}
            objects.append(entry)
        content = {"transfer": "basic", "objects": objects}
        return Reply(content=content, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def _lfs_upload(self, request: Request, oid: str) -> Reply:
        if self._store(request.body) != oid:
            raise HubError(400, "BadHash", "the content does not have the announced sha256")
        self._large.add(oid)
        return Reply(content={})

    def _commit(self, request: Request, kind: str, repo: str, revision: str) -> Reply:
        repository = self._find(kind, repo)
        parent = repository.find(revision)
        files, title = dict(parent.files), ""
        for line in request.body.decode().splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                title = value["summary"]
            elif step["key"] == "file":
                files[value["path"]] = self._store(base64.b64decode(value["content"]))
            elif step["key"] == "lfsFile":
                if value["oid"] not in self._contents:
                    raise HubError(400, "LfsMissing", f"{value['path']} was announced but not uploaded")
                files[value["path"]] = value["oid"]
            elif step["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif step["key"] == "deletedFolder":
                files = {path: oid for path, oid in files.items() if not path.startswith(value["path"])}
        oid = _sha1(json.dumps([parent.oid, title, files], sort_keys=True).encode())
        repository.commits.append(Commit(oid, title, files))
        repository.references[revision] = oid
        url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{repo}/commit/{oid}"
        return Reply(content={"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _branch(self, request: Request, kind: str, repo: str, revision: str) -> Reply:
        repository = self._find(kind, repo)
        if revision in repository.references:
            raise HubError(409, "Exists", f"Reference {revision} already exists")
        start = request.json().get("startingPoint") or "main"
        repository.references[revision] = repository.find(start).oid
        return Reply(content={})

    def _tag(self, request: Request, kind: str, repo: str, revision: str) -> Reply:
        repository = self._find(kind, repo)
        repository.references[request.json()["tag"]] = repository.find(revision).oid
        return Reply(content={})

    # Listings and downloads

    def _references(self, request: Request, kind: str, repo: str) -> Reply:
        references = self._find(kind, repo).references
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in references.items()
        ]
        return Reply(content={"branches": branches, "tags": [], "converts": []})

    def _info(self, request: Request, kind: str, repo: str, revision: str | None) -> Reply:
        repository = self._find(kind, repo)
        commit = repository.find(revision or "main")
        facts = {
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        names = {"_id": "1", "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid}
        files = [{"rfilename": path} for path in commit.files]
        card = self._contents[commit.files["README.md"]].decode() if "README.md" in commit.files else ""
        head = dict(re.findall(r"^(\w+): (\S+)$", card.split("\n---\n")[0], re.MULTILINE))
        times = {"lastModified": NOW, "createdAt": NOW}
        return Reply(content=facts | names | times | {"siblings": files, "cardData": head or None})

    def _entry(self, path: str, oid: str) -> dict[str, Any]:
        size = len(self._contents[oid])
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self._git_oid(oid), "size": size}
        if oid in self._large:
            entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
        return entry

    def _git_oid(self, oid: str) -> str:
        content = self._contents[oid]
        return _sha1(b"blob %d\0" % len(content) + content)

    def _tree(self, request: Request, kind: str, repo: str, revision: str, folder: str | None) -> Reply:
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        commit = self._find(kind, repo).find(revision)
        inside = {path: oid for path, oid in commit.files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, "EntryNotFound", f"no folder {folder}")
        if request.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
            return Reply(content=[self._entry(path, oid) for path, oid in inside.items()])
        direct = [self._entry(path, oid) for path, oid in inside.items() if "/" not in path[len(prefix) :]]
        folders = sorted({prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]})
        return Reply(
            content=direct + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        )

    def _paths_info(self, request: Request, kind: str, repo: str, revision: str) -> Reply:
        is_json = request.body.startswith(b"{")
        wanted = request.json() if is_json else parse_qs(request.body.decode())
        files = self._find(kind, repo).find(revision).files
        return Reply(content=[self._entry(path, files[path]) for path in wanted.get("paths", []) if path in files])

    def _resolve(self, request: Request, kind: str | None, repo: str, revision: str, path: str) -> Reply:
        commit = self._find(kind, repo).find(revision)
        if path not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            return Reply(404, {"error": "Entry not found"}, headers)
        oid = commit.files[path]
        content = self._contents[oid]
        tag = oid if oid in self._large else self._git_oid(oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if oid in self._large:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if request.method == "GET" and part:
            first, last = int(part[1]), int(part[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return Reply(206, content[first : last + 1], headers)
        return Reply(200, content, headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def _handle(self) -> None:
        url = urlsplit(self.path)
        if self.server_state.cuts(self.command, url.path):
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            return
        request = Request(self.command, self.headers.get("Host", ""), self._body(), parse_qs(url.query), self.headers)
        try:
            reply = self.server_state.answer(unquote(url.path), request)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            reply = Reply(error.status, {"error": error.message}, headers)
        is_raw = isinstance(reply.content, bytes)
        content = reply.content if is_raw else json.dumps(reply.content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "X-Request-Id": "local"}
        self.send_response(reply.status)
        for key, value in (headers | reply.headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _handle  # noqa: N815 (names of the base class)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *arguments: Any) -> None:
        """Stay quiet: `HubServer.requests` is the log."""


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
