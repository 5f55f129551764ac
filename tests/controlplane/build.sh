#!/usr/bin/env bash
# Builds the real control plane for the tests and prints the folder that holds it (for KUBEBUILDER_ASSETS).
# The first build takes about seven minutes on two cores; afterwards the cache answers at once.
#
#   export KUBEBUILDER_ASSETS=$(tests/controlplane/build.sh)
#
# Needs Go and the Go module proxy. SPOTTER_CACHE moves the cache.
set -euo pipefail
cd "$(dirname "$0")"

version=$(awk '$1 == "k8s.io/kubernetes" && $2 ~ /^v/ { print $2; exit }' go.mod)
# A changed go.mod gets a folder of its own, so that a cache never serves other versions than it says.
digest=$(cat go.mod build.sh | sha256sum | cut -c1-12)
cache=${SPOTTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/spotter}
target=$cache/controlplane-$version-$digest
if [ -x "$target/kube-apiserver" ]; then
  echo "$target"
  exit 0
fi

command -v go >/dev/null || { echo "build.sh: Go is needed to build the control plane (https://go.dev/dl)" >&2; exit 1; }
mkdir -p "$cache"
# Built beside the target and renamed when whole: an interrupted build never looks like a finished one.
work=$(mktemp -d "$cache/.building.XXXXXX")
trap 'rm -rf "$work"' EXIT

minor=${version#v1.}
minor=${minor%%.*}
base=k8s.io/component-base/version
flags="-s -w -X $base.gitVersion=$version -X $base.gitMajor=1 -X $base.gitMinor=$minor"
build() { # NAME PACKAGE
  echo "build.sh: building $1" >&2
  CGO_ENABLED=0 go build -trimpath -ldflags "$flags" -o "$work/$1" "$2" >&2
}
build etcd go.etcd.io/etcd/server/v3
build ec2-metadata-mock github.com/aws/amazon-ec2-metadata-mock/cmd/ec2-metadata-mock
build kube-controller-manager k8s.io/kubernetes/cmd/kube-controller-manager
build kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver

chmod 755 "$work"
if ! mv -T "$work" "$target" 2>/dev/null && [ ! -x "$target/kube-apiserver" ]; then
  echo "build.sh: cannot move the finished build to $target" >&2
  exit 1
fi
trap - EXIT
echo "$target"
