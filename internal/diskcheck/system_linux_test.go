package diskcheck

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

const mounts = `22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro
30 27 8:17 / /var/lib rw,noatime shared:2 master:3 - ext4 /dev/sdb1 rw,nobarrier,data=writeback
31 30 0:40 / /var/lib/my\040data rw - tmpfs tmpfs rw,size=4k
32 30 0:41 / /var/lib/my\040data rw - btrfs /dev/sdc1 rw,subvol=/
broken line
33 27 0:50 / /var/library rw - 9p host rw
`

func TestTheMountOfAPath(t *testing.T) {
	for path, want := range map[string][3]string{
		"/home/x":             {"/", "ext4", "259:2"},
		"/var/lib":            {"/var/lib", "ext4", "8:17"},
		"/var/lib/holdfast":   {"/var/lib", "ext4", "8:17"},
		"/var/lib/my data/db": {"/var/lib/my data", "btrfs", "0:41"}, // the one on top
		"/var/library/x":      {"/var/library", "9p", "0:50"},
		"/var/libx":           {"/", "ext4", "259:2"},
	} {
		var f Facts
		device := f.mounted(mounts, path)
		if got := [3]string{f.Mount, f.Type, device}; got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	var f Facts
	f.mounted(mounts, "/var/lib/holdfast")
	if !slices.Contains(f.Options, "nobarrier") || !slices.Contains(f.Options, "noatime") || f.Source != "/dev/sdb1" {
		t.Errorf("%+v", f)
	}
}

// TestTheDiskOfADevice has a sysfs of its own: a partition, a disk that is virtual, and a file system without a device number.
func TestTheDiskOfADevice(t *testing.T) {
	sys := t.TempDir()
	put := func(path, text string) {
		t.Helper()
		path = filepath.Join(sys, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := func(to, at string) {
		t.Helper()
		at = filepath.Join(sys, at)
		if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(sys, to), at); err != nil {
			t.Fatal(err)
		}
	}
	put("devices/pci/ata1/block/sda/queue/write_cache", "write back")
	put("devices/pci/ata1/block/sda/queue/rotational", "1")
	put("devices/pci/ata1/block/sda/queue/fua", "0")
	put("devices/pci/ata1/block/sda/device/model", "ACME 1000")
	put("devices/pci/ata1/block/sda/device/vendor", "ATA")
	put("devices/pci/ata1/block/sda/sda1/partition", "1")
	link("devices/pci/ata1/block/sda/sda1", "dev/block/8:1")
	link("devices/pci/ata1/block/sda/sda1", "class/block/sda1")
	put("devices/pci/virtio1/block/vda/queue/write_cache", "write through")
	link("devices/pci/virtio1/block/vda", "dev/block/254:0")

	var f Facts
	f.block(sys, "8:1")
	if f.Disk != "sda" || f.WriteCache != "write back" || f.Rotational == nil || !*f.Rotational || f.FUA == nil || *f.FUA || f.Model != "ATA ACME 1000" || f.Virtual {
		t.Errorf("%+v", f)
	}
	f = Facts{}
	f.block(sys, "254:0")
	if f.Disk != "vda" || !f.Virtual || f.Rotational != nil {
		t.Errorf("%+v", f)
	}
	f = Facts{Source: "/dev/sda1"}
	f.block(sys, "0:41")
	if f.Disk != "sda" {
		t.Errorf("%+v", f)
	}
	f = Facts{Source: "overlay"}
	f.block(sys, "0:99")
	if f.Disk != "" {
		t.Errorf("%+v", f)
	}
}
