package diskcheck

import (
	"slices"
	"strings"
)

// Facts is what the system says of the place, as far as it says anything.
type Facts struct {
	Dir     string   `json:"dir"`
	Mount   string   `json:"mount,omitempty"`   // where the file system is mounted
	Type    string   `json:"type,omitempty"`    // ext4, tmpfs …
	Source  string   `json:"source,omitempty"`  // /dev/sda1
	Options []string `json:"options,omitempty"` // of the mount and of the file system

	Disk       string `json:"disk,omitempty"` // the whole device: sda, nvme0n1
	Model      string `json:"model,omitempty"`
	WriteCache string `json:"write_cache,omitempty"` // write back, write through
	Rotational *bool  `json:"rotational,omitempty"`
	FUA        *bool  `json:"fua,omitempty"`
	Virtual    bool   `json:"virtual,omitempty"` // a machine's disk that is a file or a volume of its host

	FreeBytes int64 `json:"free_bytes"`
}

// has says whether one of the options is set.
func (f *Facts) has(options ...string) string {
	for _, o := range options {
		if slices.Contains(f.Options, o) {
			return o
		}
	}
	return ""
}

// kind sorts file systems by what stands below them.
type kind int

const (
	onDisk kind = iota
	inMemory
	remote
	layered
)

func (f *Facts) kind() kind {
	switch t := f.Type; {
	case t == "tmpfs", t == "ramfs", t == "rootfs", t == "hugetlbfs",
		strings.HasPrefix(f.Disk, "zram"), strings.HasPrefix(f.Disk, "ram"):
		return inMemory
	case t == "overlay", t == "aufs":
		return layered
	case t == "9p", t == "virtiofs", t == "nfs", t == "nfs4", t == "cifs", t == "smb3", t == "smbfs", t == "afs", t == "ceph", t == "glusterfs",
		t == "vboxsf", t == "prl_fs", t == "vmhgfs", strings.HasPrefix(t, "fuse"):
		if t == "fuseblk" { // ntfs-3g and its like: on a disk of this machine
			return onDisk
		}
		return remote
	}
	return onDisk
}
