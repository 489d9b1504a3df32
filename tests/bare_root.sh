#!/usr/bin/env bash
# Proves both commands of README.md on a machine that has nothing: a bare Debian 12 made by debootstrap, in which a clean
# clone is run through chroot. Needs root, debootstrap and git.
#
# Everything is mounted in a mount and process namespace of this script's own: when it ends, however it ends, the kernel
# unmounts all of it and ends every process in it, and only then is the folder removed.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tests/bare_root.sh [--uncommitted] [--no-tests] [--keep]

  --uncommitted   copy the working tree as it stands, instead of cloning HEAD
  --no-tests      leave out tests/run.sh
  --keep          leave the root's folder behind and name it
TEXT
}

uncommitted='' tests=yes keep='' inside=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --uncommitted) uncommitted=yes ;;
        --no-tests) tests='' ;;
        --keep) keep=yes ;;
        --inside) inside=$2; shift ;; # this script, started again in its namespace
        *) echo "unknown argument: $1; see --help" >&2; exit 2 ;;
    esac
    shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '\n=== bare root, %d s: %s\n' "$SECONDS" "$*"; }

# --------------------------------------------------------------------------------- outside: the folder and its removal
if [ -z "$inside" ]; then
    [ "$(id -u)" -eq 0 ] || { echo "tests/bare_root.sh needs root, for chroot" >&2; exit 1; }
    for tool in debootstrap git unshare; do
        command -v "$tool" > /dev/null || { echo "missing: apt-get install -y debootstrap git util-linux" >&2; exit 1; }
    done
    folder=$(mktemp -d "${TMPDIR:-/var/tmp}/mpidl-bare-root.XXXXXX")
    chmod 755 "$folder" # it is the root of other users there
    # Nothing is mounted here any more by then; should something be, --one-file-system does not follow it.
    if [ -n "$keep" ]; then echo "the root will be kept: $folder"; else trap 'rm -rf --one-file-system "$folder"' EXIT; fi
    trap 'exit 130' INT TERM
    arguments=(--inside "$folder")
    [ -z "$uncommitted" ] || arguments+=(--uncommitted)
    [ -n "$tests" ] || arguments+=(--no-tests)
    unshare --mount --pid --fork --kill-child --propagation private tests/bare_root.sh "${arguments[@]}" < /dev/null
    exit 0
fi

# ----------------------------------------------------------------------------------------------- inside the namespaces
root=$inside
trap 'exit 130' INT TERM # process 1 of a namespace has no default action for them

# The mirror that this machine's apt uses for Debian 12 itself, whatever its name; debootstrap's own choice if it is not Debian 12.
mirror=$(apt-get indextargets --format "\$(SITE) \$(RELEASE) \$(COMPONENT)" 2> /dev/null |
    awk '$2 == "bookworm" && $3 == "main" { print $1; exit }')
apt_proxy=$(apt-config dump Acquire::http::Proxy 2> /dev/null | sed -n 's/.* "\(.*\)";/\1/p')
[ -z "$apt_proxy" ] || export http_proxy=${http_proxy:-$apt_proxy}

copy_in() { # files that must stand in the root at the place that they have here
    local file
    for file; do
        if [ -f "$file" ]; then
            mkdir -p "$root$(dirname "$file")"
            cp --dereference "$file" "$root$file"
        fi
    done
}

bind_in() { # folders, read-only
    local folder
    for folder; do
        if ! mountpoint -q "$root$folder"; then
            mkdir -p "$root$folder"
            mount --bind "$folder" "$root$folder"
            mount -o remount,bind,ro "$root$folder"
        fi
    done
}

make_root() {
    debootstrap --variant=minbase bookworm "$root" ${mirror:+"$mirror"} > "$root.log" 2>&1 || { tail -n 20 "$root.log"; return 1; }
    rm -f "$root.log"
    # How this machine reaches and believes its mirror.
    apt-config dump 2> /dev/null | grep -E '^Acquire::(Check|http|https|Retries)' > "$root/etc/apt/apt.conf.d/90-host" || true
    copy_in /etc/resolv.conf /etc/hosts /etc/hostname
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm" # its own, as on a machine of its own
}

# Brings pip's settings into the root: its variables and files, and the folders and files that they name.
pass_pip_settings() {
    local value
    settings=()
    while IFS= read -r -d '' value; do
        case $value in
            PIP_* | http_proxy=* | https_proxy=* | no_proxy=* | HTTP_PROXY=* | HTTPS_PROXY=* | NO_PROXY=* | \
                SSL_CERT_FILE=* | REQUESTS_CA_BUNDLE=* | MPIDL_TORCH_INDEX=*) settings+=("$value") ;;
        esac
    done < <(env -0)
    copy_in /etc/pip.conf /etc/xdg/pip/pip.conf
    for value in "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" "$HOME/.pip/pip.conf"; do
        if [ -f "$value" ] && [ -z "${PIP_CONFIG_FILE:-}" ]; then # this user's own, for every user there
            cp "$value" "$root/etc/pip-of-the-user.conf"
            settings+=(PIP_CONFIG_FILE=/etc/pip-of-the-user.conf)
        fi
    done
    while read -r value; do
        case $value in
            # A simple index stands beside the files that it names, so the folder above both is needed.
            file:///*) value=$(dirname "${value#file://}") ;;
        esac
        # What is no path of this machine's needs nothing; neither do system folders that the root has as its own.
        case $value in / | /usr | /etc | /var | /home | /root | /tmp) continue ;; esac
        if [ -d "$value" ]; then bind_in "$value"; elif [ -f "$value" ]; then copy_in "$value"; fi
    done < <(
        {
            printf '%s\n' "${settings[@]#*=}"
            cat "$root"/etc/pip*.conf "$root/etc/xdg/pip/pip.conf" 2> /dev/null | sed 's/^[^=]*=//'
        } | tr -s ' \t' '\n' | grep -E '^(/|file:///)' | sort -u
    )
}

in_root() { # USER:GROUP, HOME, FOLDER, COMMAND: with a clean environment and without standard input
    chroot --userspec="$1" "$root" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        HOME="$2" LANG=C.UTF-8 CI="${CI:-}" "${settings[@]}" /bin/bash -c "cd '$3' && $4" < /dev/null
}

copy_source() { # to
    if [ -n "$uncommitted" ]; then
        mkdir -p "$1"
        git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --target-directory="$1"
    else
        git clone --quiet --no-hardlinks . "$1"
    fi
}

say "debootstrap"
make_root
settings=()
copy_source "$root/root/mpidl"

say "without python3 and gcc the quick start names what is missing"
if said=$(in_root 0:0 /root /root/mpidl jobs/quickstart.sh 2>&1); then
    echo "the quick start claims to have worked without python3:"; echo "$said"; exit 1
fi
echo "$said"
line=$(grep -o 'apt-get install -y .*' <<< "$said") || { echo "no apt line was named"; exit 1; }

say "following it: $line"
in_root 0:0 /root / "export DEBIAN_FRONTEND=noninteractive; apt-get -q update && $line" > "$root/apt.log" 2>&1 ||
    { tail -n 20 "$root/apt.log"; exit 1; }
pass_pip_settings # after apt, which makes the certificates anew

say "jobs/quickstart.sh as root"
in_root 0:0 /root /root/mpidl jobs/quickstart.sh

say "jobs/quickstart.sh as a user"
chroot "$root" useradd --create-home somebody
copy_source "$root/home/somebody/mpidl"
chroot "$root" chown -R somebody:somebody /home/somebody
in_root somebody:somebody /home/somebody /home/somebody/mpidl jobs/quickstart.sh

if [ -n "$tests" ]; then
    say "tests/run.sh"
    in_root 0:0 /root /root/mpidl tests/run.sh
fi
say "all went well"
