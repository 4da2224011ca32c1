"A hub on this machine: as much of the Hugging Face hub's protocol as pushing and pulling a model repository needs"
import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_owner"


class Repositories:
    "What the hub holds: of each repository its branches and commits, files by commit; and what was asked"
    def __init__(self): self.repos, self.blobs, self.requests, self.private = {}, {}, [], set()

    def create(self, name):
        self.repos[name] = {"branches": {"main": None}, "commits": {}}
        self.commit(name, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, name, branch, files) -> str:
        repo = self.repos[name]
        whole = repo["commits"].get(repo["branches"][branch], {}) | files
        oid = hashlib.sha1(f"{name} {branch} {len(repo['commits'])} {sorted(whole)}".encode()).hexdigest()
        repo["commits"][oid], repo["branches"][branch] = whole, oid
        return oid

    def at(self, name, revision) -> tuple:  # commit, its files
        repo = self.repos[name]
        oid = repo["branches"].get(revision, revision)
        return oid, repo["commits"].get(oid)


class Handler(BaseHTTPRequestHandler):
    "One request"
    hub: Repositories
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def answer(self, status=200, body=None, **headers):
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(data), "Content-Type": "application/json", "Connection": "close"} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(data)

    def refuse(self, status, code, message): self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def do_HEAD(self): self.route()
    def do_GET(self): self.route()
    def do_POST(self): self.route()
    def do_PUT(self): self.route()

    def route(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""): self.body = b"".join(self.chunks())
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command in ("POST", "PUT") and not owner and not url.path.startswith("/blobs/"):
            return self.refuse(401, "", "Invalid username or password.")
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, url.path):
                args = [unquote(g) for g in found.groups()]
                name = args[0] if args else ""
                if "/" in name and (name not in self.hub.repos or (name in self.hub.private and not owner)):
                    return self.refuse(401, "RepoNotFound", "Repository not found")
                return method(self, *args)
        self.refuse(404, "", f"this double knows no {url.path}")

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        if name in self.hub.repos: return self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        self.hub.create(name)
        if asked.get("private") or asked.get("visibility") == "private": self.hub.private.add(name)
        self.answer(200, {"url": f"{self.server.url}/{name}"})

    def branch(self, name, branch):
        repo = self.hub.repos[name]
        if branch in repo["branches"]: return self.refuse(409, "", "Reference already exists")
        repo["branches"][branch] = repo["branches"]["main"]
        self.answer()

    def info(self, name, revision="main"):
        oid, files = self.hub.at(name, revision)
        if files is None: return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        self.answer(200, {"_id": name, "id": name, "modelId": name, "sha": oid, "private": False, "tags": [], "downloads": 0, "likes": 0,
                          "siblings": [{"rfilename": f} for f in files]})

    def tree(self, name, revision):
        _, files = self.hub.at(name, revision)
        self.answer(200, [entry(path, data) for path, data in files.items()])

    def yaml(self): self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision):
        if self.hub.at(name, revision)[1] is None: return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = json.loads(self.body)["files"]
        self.answer(200, {"files": [{"path": f["path"], "shouldIgnore": False, "oid": None,
                                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]})

    def batch(self, _):
        objects = json.loads(self.body)["objects"]
        self.answer(200, {"transfer": "basic", "objects": [o | {"actions": {"upload": {"href": f"{self.server.url}/blobs/{o['oid']}"}}} for o in objects]})

    def blob(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.answer()

    def commit(self, name, branch):
        files = {}
        for line in self.body.decode().splitlines():
            said = json.loads(line)
            if said["key"] == "file": files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            if said["key"] == "lfsFile": files[said["value"]["path"]] = self.hub.blobs[said["value"]["oid"]]
        oid = self.hub.commit(name, branch, files)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}", "hookOutput": ""})

    def resolve(self, name, revision, path):
        oid, files = self.hub.at(name, revision)
        if files is None: return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in files: return self.refuse(404, "EntryNotFound", "Entry not found")
        self.answer(200, files[path], X_Repo_Commit=oid, ETag=f'"{etag(path, files[path])}"', Content_Type="application/octet-stream")


def etag(path, data) -> str:
    if path.endswith(".safetensors"): return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path, data) -> dict:
    "A file as a listing shows it"
    found = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if path.endswith(".safetensors"): found["lfs"] = {"oid": etag(path, data), "size": len(data), "pointerSize": 130}
    return found


NAME, REST = "([^/]+/[^/]+)", "(.+)"
ROUTES = [("/api/repos/create", Handler.create), ("/api/validate-yaml", Handler.yaml), (f"/api/models/{NAME}/branch/{REST}", Handler.branch),
          (f"/api/models/{NAME}/revision/{REST}", Handler.info), (f"/api/models/{NAME}/tree/{REST}", Handler.tree),
          (f"/api/models/{NAME}/preupload/{REST}", Handler.preupload), (f"/api/models/{NAME}/commit/{REST}", Handler.commit),
          (f"/api/models/{NAME}", Handler.info), (f"/{NAME}.git/info/lfs/objects/batch", Handler.batch), ("/blobs/([0-9a-f]+)", Handler.blob),
          (f"/{NAME}/resolve/([^/]+)/{REST}", Handler.resolve)]


@contextmanager
def hub(monkeypatch, cache):
    "A hub that runs inside, and that huggingface_hub talks to; `cache` is a folder for what it downloads"
    import huggingface_hub.constants as constants
    held = Repositories()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Double", (Handler,), {"hub": held}))
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    known = dict(ENDPOINT=server.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_HUB_CACHE=str(cache), HF_HUB_DISABLE_PROGRESS_BARS=True,
                 HUGGINGFACE_CO_URL_TEMPLATE=server.url + "/{repo_id}/resolve/{revision}/{filename}", HF_TOKEN_PATH=str(cache/"token"))
    for name, value in known.items(): monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try: yield held
    finally:
        server.shutdown()
        server.server_close()
