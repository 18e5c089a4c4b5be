#!/usr/bin/env bash
# The first process of a host of three_hosts.py, in namespaces of its own: makes its file system, and runs its sshd.
# Arguments: name, base folder, uv cache.
set -euo pipefail
name=$1 base=$2 cache=$3
root=$base/$name/root

# This machine's system below, what the host writes above, in memory that goes with it.
mount -t tmpfs tmpfs "$base/$name"
mkdir "$base/$name/"{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/$name/upper,workdir=$base/$name/work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t sysfs -o ro sysfs "$root/sys"

# Only the system's own folders show through; homes, /tmp and whatever else lies on this machine do not.
for folder in "$root"/*/; do
  case $(basename "$folder") in
    bin | boot | dev | etc | lib* | proc | sbin | sys | usr | var) ;;
    *) mount -t tmpfs -o mode=755 tmpfs "$folder" ;;
  esac
done
chmod 1777 "$root/tmp"
chmod 700 "$root/root"
mount -t tmpfs -o mode=1777 tmpfs "$root/var/tmp"
mkdir -p "$root/shared" "$root/var/cache/uv" "$root/run/sshd" "$root/root/.ssh" "$root/etc/uv"
mount --bind "$base/shared" "$root/shared"
mount --bind "$cache" "$root/var/cache/uv"
# The cache is on another file system than a host's, so links have to be symbolic; the hosts trust whom Debian trusts.
printf 'cache-dir = "/var/cache/uv"\nlink-mode = "symlink"\nsystem-certs = true\n' >"$root/etc/uv/uv.toml"

hostname "$name"
echo "$name" >"$root/etc/hostname"
printf '127.0.0.1 localhost\n10.77.0.10 laptop\n10.77.0.11 head\n10.77.0.12 worker-1\n10.77.0.13 worker-2\n' >"$root/etc/hosts"
cp "$base/key.pub" "$root/root/.ssh/authorized_keys"
cp "$root/etc/skel/.bashrc" "$root/root/"
rm -f "$root"/etc/ssh/ssh_host_*
chroot "$root" ssh-keygen -q -A
# bash stays the first process, which has to collect what others leave behind.
exec chroot "$root" bash -c '/usr/sbin/sshd -D -o PermitRootLogin=prohibit-password & wait'
