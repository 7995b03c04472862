"""A real control plane on loopback: etcd, kube-apiserver, controller manager, scheduler, KubeRay's operator, Kueue, and kwok for nodes.

What is simulated: nodes and the life of their pods (kwok), Ray's dashboard (Dashboard below), and the work inside pods, which a
test does in their place (tests/k8s/pods.py). Everything that admits, refuses, schedules and queues is real.
"""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import json
import os
import secrets
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from jobs.cluster import Cluster, connect
from tests.k8s.tools import program, sources

READY_S = 120.0
CONTROLLERS = (
    "garbage-collector-controller", "job-controller", "resourcequota-controller", "namespace-controller", "serviceaccount-controller",
    "ttl-after-finished-controller", "deployment-controller", "replicaset-controller", "root-ca-certificate-publisher-controller",
    "persistentvolume-binder-controller", "pod-garbage-collector-controller",
)  # fmt: skip


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Certificates:
    """An authority and one certificate for this machine's loopback and Kueue's webhook service."""

    def __init__(self, folder: Path) -> None:
        self.ca, self.certificate, self.key = folder / "ca.crt", folder / "tls.crt", folder / "tls.key"
        self.ca_key, self.account_key = folder / "ca.key", folder / "accounts.key"
        authority_key, authority = self._issue("kueue-ca", None, None)
        key, certificate = self._issue("datadose-test", authority_key, authority)
        self._write(self.ca, authority.public_bytes(serialization.Encoding.PEM))
        self._write(self.ca_key, _pem(authority_key))
        self._write(self.certificate, certificate.public_bytes(serialization.Encoding.PEM))
        self._write(self.key, _pem(key))
        self._write(self.account_key, _pem(rsa.generate_private_key(65537, 2048)))

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        path.chmod(0o600)

    @staticmethod
    def _issue(name: str, signer: Any, authority: x509.Certificate | None) -> tuple[Any, x509.Certificate]:
        key, now = rsa.generate_private_key(65537, 2048), datetime.datetime.now(datetime.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "kueue")])
        made = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(authority.subject if authority else subject).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        )  # fmt: skip
        if authority is None:
            usage = x509.KeyUsage(True, False, True, False, False, True, True, False, False)
            names = x509.SubjectAlternativeName([x509.DNSName(name)])  # or Kueue takes it for another's and makes its own
            made = made.add_extension(usage, critical=True).add_extension(names, critical=False)
        else:
            names = [x509.DNSName(name) for name in ("localhost", "kueue-webhook-service.kueue-system.svc")]
            made = made.add_extension(x509.SubjectAlternativeName([*names, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
            usages = [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
            made = made.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return key, made.sign(signer or key, hashes.SHA256())


def _pem(key: Any) -> bytes:
    return bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()))


class Dashboard:
    """The dashboards of all Ray clusters, which KubeRay's operator reaches through an HTTP proxy: what a test says of each Ray job."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        """Submission id -> what Ray's API answers."""
        dashboard = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # http.server's name
                self._answer(dashboard.jobs.get(urlsplit(self.path).path.rsplit("/", 1)[-1]))

            def do_POST(self) -> None:  # http.server's name
                self._answer({"stopped": True})

            def _answer(self, found: dict[str, Any] | None) -> None:
                # A Ray cluster that asks for tokens answers nobody without one.
                status = 401 if "Authorization" not in self.headers and "X-Ray-Authorization" not in self.headers else 200 if found else 404
                body = json.dumps(found or {}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def say(self, submission: str, status: str, message: str = "") -> None:
        now = int(time.time() * 1000)
        self.jobs[submission] = {"submission_id": submission, "status": status, "message": message, "start_time": now, "end_time": now}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class ControlPlane:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificates = Certificates(folder)
        self.dashboard = Dashboard()
        self.ports = dict(zip(("etcd", "peer", "api", "kueue", "health", "metrics", "kwok", "visibility"), free_ports(8), strict=True))
        self.url = f"https://127.0.0.1:{self.ports['api']}"
        self.token = secrets.token_hex(16)
        self.kubeconfig = folder / "kubeconfig"
        self.write_kubeconfig(self.kubeconfig, self.token)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    # ------------------------------------------------------------ users

    def write_kubeconfig(self, path: Path, token: str) -> None:
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority": str(self.certificates.ca)}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(content))
        path.chmod(0o600)

    def cluster(self, namespace: str = "datadose") -> Cluster:
        """As an administrator."""
        return self._connect(self.kubeconfig, namespace)

    def account_token(self, account: str, namespace: str = "datadose") -> str:
        """What the kubelet puts into a pod of this service account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 7200}}
        return str(self.cluster().request("POST", path, body=body)["status"]["token"])

    def account_kubeconfig(self, account: str, namespace: str = "datadose") -> Path:
        """As a pod of this service account would talk to the API server."""
        target = self.folder / f"kubeconfig-{account}-{secrets.token_hex(3)}"
        self.write_kubeconfig(target, self.account_token(account, namespace))
        return target

    def as_account(self, account: str, namespace: str = "datadose") -> Cluster:
        return self._connect(self.account_kubeconfig(account, namespace), namespace)

    @staticmethod
    def _connect(kubeconfig: Path, namespace: str) -> Cluster:
        before = os.environ.get("KUBECONFIG")
        os.environ["KUBECONFIG"] = str(kubeconfig)
        try:
            return connect("test", namespace, outage_s=60)
        finally:
            os.environ.pop("KUBECONFIG")
            if before is not None:
                os.environ["KUBECONFIG"] = before

    # ------------------------------------------------------------ processes

    def _run(self, name: str, *arguments: str, **environment: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            self._processes[name] = subprocess.Popen(
                [program(name), *arguments], env={"HOME": str(self.folder), "PATH": "/usr/bin:/bin", "GOMAXPROCS": "2", **environment},
                cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self, name: str) -> None:
        """As a crash does."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def start_api(self) -> None:
        ours = self.certificates
        tokens = self.folder / "tokens.csv"
        tokens.write_text(f'{self.token},admin,admin,"system:masters"\n')
        tokens.chmod(0o600)
        self._run(
            "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{self.ports['etcd']}", "--bind-address=127.0.0.1", f"--secure-port={self.ports['api']}",
            f"--tls-cert-file={ours.certificate}", f"--tls-private-key-file={ours.key}", f"--token-auth-file={tokens}", "--authorization-mode=RBAC",
            "--service-account-issuer=https://datadose.test", f"--service-account-key-file={ours.account_key}",
            f"--service-account-signing-key-file={ours.account_key}", "--service-cluster-ip-range=10.96.0.0/16", "--endpoint-reconciler-type=none",
            "--disable-admission-plugins=TaintNodesByCondition",  # which the node lifecycle's controller would undo
            "--anonymous-auth=true", "--allow-privileged=false", f"--kubelet-certificate-authority={ours.ca}", "--profiling=false", "--v=1",
        )  # fmt: skip

    def start(self) -> None:
        etcd = f"http://127.0.0.1:{self.ports['etcd']}"
        peer = f"http://127.0.0.1:{self.ports['peer']}"
        self._run(
            "etcd", f"--data-dir={self.folder / 'etcd-data'}", f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}", "--unsafe-no-fsync", "--log-level=warn",
        )  # fmt: skip
        self.start_api()
        self._await_url(f"{self.url}/readyz", "kube-apiserver")
        self._install(*sorted(sources("github.com/ray-project/kuberay/ray-operator", "kuberay").glob("config/crd/bases/*.yaml")))
        # After the definitions: it looks for kinds to count for quotas when it starts, and then every half minute.
        ours = self.certificates
        self._run(
            "kube-controller-manager", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0", f"--controllers={','.join(CONTROLLERS)}",
            f"--service-account-private-key-file={ours.account_key}", f"--root-ca-file={ours.ca}", "--resource-quota-sync-period=30s", "--v=1",
        )  # fmt: skip
        self._run("kube-scheduler", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0", "--v=1")
        self._start_nodes()
        # Ray's dashboards are behind a proxy that answers in their place; the API server is on loopback, which no proxy is asked for.
        self._run(
            "kuberay", "--enable-leader-election=false", "--metrics-addr=127.0.0.1:0", "--health-probe-bind-address=127.0.0.1:0",
            KUBECONFIG=str(self.kubeconfig), HTTP_PROXY=self.dashboard.url, NO_PROXY="127.0.0.1",
        )  # fmt: skip
        self._start_kueue()

    def close(self) -> None:
        for name in list(self._processes):
            self.stop(name)
        self.dashboard.close()

    def _await_url(self, url: str, name: str) -> None:
        context = ssl.create_default_context(cafile=str(self.certificates.ca))
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(url, timeout=2, context=context if url.startswith("https") else None).status == 200:
                    return
            if self._processes[name].poll() is not None:
                break
            time.sleep(0.2)
        raise AssertionError(f"{name} does not get ready:\n{self.log(name)[-3000:]}")

    # ------------------------------------------------------------ nodes

    def _start_nodes(self) -> None:
        stages = Path(__file__).parent / "stages.yaml"
        text = stages.read_text().replace("LOGS_FILE", str(self.folder / "pod.log"))
        (self.folder / "kwok.yaml").write_text(text)
        (self.folder / "pod.log").write_text("2026-01-01T00:00:00.000000000Z stdout F a line of a pod's log\n")
        ours = self.certificates
        self._run(
            "kwok", f"--kubeconfig={self.kubeconfig}", f"--config={self.folder / 'kwok.yaml'}", "--manage-all-nodes=true", "--node-ip=127.0.0.1",
            f"--node-port={self.ports['kwok']}", f"--server-address=127.0.0.1:{self.ports['kwok']}", f"--tls-cert-file={ours.certificate}",
            f"--tls-private-key-file={ours.key}", "--node-lease-duration-seconds=40",
        )  # fmt: skip
        volume = {"capacity": {"storage": "200Gi"}, "accessModes": ["ReadWriteMany"], "hostPath": {"path": "/nowhere"}}
        self.cluster().request(
            "POST", "/api/v1/persistentvolumes", body={"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "models"}, "spec": volume}
        )
        self.add_node("cpu-1", cpu="64", memory="512Gi")
        for index in range(2):
            self.add_node(f"gpu-{index}", cpu="64", memory="1Ti", **{"nvidia.com/gpu": "8"})

    def add_node(self, name: str, **resources: str) -> None:
        found = {"pods": "110", **resources}
        taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}] if "nvidia.com/gpu" in resources else []
        cluster = self.cluster()
        cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}, "spec": {"taints": taints}})
        cluster.request(
            "PATCH", f"/api/v1/nodes/{name}/status", body={"status": {"allocatable": found, "capacity": found}}, content="application/merge-patch+json"
        )

    # ------------------------------------------------------------ operators

    def _install(self, *files: Path) -> None:
        cluster = self.cluster()
        names = []
        for file in files:
            for item in yaml.load_all(file.read_text(), yaml.CSafeLoader):
                if item and item["kind"] == "CustomResourceDefinition":
                    cluster.apply(item)
                    names.append(item["metadata"]["name"])
        for name in names:
            self.wait_for(lambda name=name: _condition(cluster.get(("apiextensions.k8s.io/v1", "CustomResourceDefinition"), name), "Established"), name)

    def _start_kueue(self) -> None:
        """Its webhooks run on loopback; what its own deployment would mount, the certificate, is laid where it looks."""
        folder, cluster, ours = sources("sigs.k8s.io/kueue"), self.cluster("kueue-system"), self.certificates
        url = f"https://127.0.0.1:{self.ports['kueue']}"
        bundle = _base64(ours.ca.read_bytes())
        cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kueue-system"}})
        converted = {"clusterqueues", "cohorts", "localqueues", "multikueueclusters", "workloads"}
        for file in sorted((folder / "config/components/crd/bases").glob("*.yaml")):
            item = yaml.load(file.read_text(), yaml.CSafeLoader)
            if item["spec"]["names"]["plural"] in converted:
                webhook = {"clientConfig": {"url": f"{url}/convert", "caBundle": bundle}, "conversionReviewVersions": ["v1"]}
                item["spec"]["conversion"] = {"strategy": "Webhook", "webhook": webhook}
            cluster.apply(item)
        secret = {"ca.crt": ours.ca, "ca.key": ours.ca_key, "tls.crt": ours.certificate, "tls.key": ours.key}
        data = {name: _base64(path.read_bytes()) for name, path in secret.items()}
        path = "/api/v1/namespaces/kueue-system/secrets"
        cluster.request("POST", path, body={"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "kueue-webhook-server-cert"}, "data": data})
        for item in yaml.load_all((folder / "config/components/webhook/manifests.yaml").read_text(), yaml.CSafeLoader):
            item["metadata"]["name"] = f"kueue-{item['metadata']['name']}"
            for webhook in item["webhooks"]:
                webhook["clientConfig"] = {"url": url + webhook["clientConfig"]["service"]["path"], "caBundle": bundle}
                if any(rule["resources"] in (["pods"], ["deployments"], ["statefulsets"]) for rule in webhook["rules"]):
                    webhook["namespaceSelector"] = {"matchLabels": {"kueue-manages-pods": "true"}}  # frameworks that the configuration leaves out
            plural = "mutatingwebhookconfigurations" if item["kind"].startswith("Mutating") else "validatingwebhookconfigurations"
            cluster.request("POST", f"/apis/admissionregistration.k8s.io/v1/{plural}", body=item)
        settings = {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2", "kind": "Configuration", "namespace": "kueue-system",
            "health": {"healthProbeBindAddress": f"127.0.0.1:{self.ports['health']}"}, "metrics": {"bindAddress": f"127.0.0.1:{self.ports['metrics']}"},
            "webhook": {"host": "127.0.0.1", "port": self.ports["kueue"], "certDir": str(self.folder)}, "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": True}, "clientConnection": {"qps": 100, "burst": 200},
            "integrations": {"frameworks": ["batch/job", "ray.io/rayjob", "ray.io/raycluster"]},
        }  # fmt: skip
        (self.folder / "kueue.yaml").write_text(yaml.safe_dump(settings))
        self._run("kueue", f"--config={self.folder / 'kueue.yaml'}", "--feature-gates=VisibilityOnDemand=false", KUBECONFIG=str(self.kubeconfig))
        self._await_url(f"http://127.0.0.1:{self.ports['health']}/readyz", "kueue")

    # ------------------------------------------------------------ waiting

    @staticmethod
    def wait_for(found: Any, what: str, timeout_s: float = 120) -> Any:
        """What `found` returns once it is true."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if value := found():
                return value
            time.sleep(0.2)
        raise AssertionError(f"{what}: not within {timeout_s:.0f} s")


def _condition(item: Any, kind: str) -> bool:
    return bool(item) and any(each["type"] == kind and each["status"] == "True" for each in (item.get("status", {}).get("conditions") or ()))


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(folder)
    try:
        plane.start()
        yield plane
    finally:
        plane.close()
