package gateway

import (
	"fmt"
	"os"
	"path/filepath"

	"holdfast/internal/config"
	"holdfast/internal/kv"
	"holdfast/spool"
)

// DiskWarnings holds what the lanes may keep against the file system that they keep it on.
func DiskWarnings(c *config.Config) config.Problems {
	dir := c.Gateway.DataDir
	for { // it may have to be made
		if _, err := os.Stat(dir); err == nil || filepath.Dir(dir) == dir {
			break
		}
		dir = filepath.Dir(dir)
	}
	u, err := kv.DiskUsage(dir)
	if err != nil || u.Total == 0 {
		return nil // not known, or the start will tell
	}
	var found config.Problems
	warn := func(key, format string, args ...any) {
		found = append(found, config.Problem{Key: key, Text: fmt.Sprintf(format, args...), Warning: true})
	}
	reserve := kv.Reserve(c.Spool.DiskReserve, u.Total)
	if c.Spool.DiskReserve > reserve {
		warn("spool.disk_reserve", "is more than a half of the file system of %s, which has %s: %s are kept", dir, sizeText(u.Total), sizeText(uint64(reserve)))
	}
	sum := uint64(spool.SystemMaxBytes)
	for _, l := range c.Spool.Lanes {
		sum += uint64(l.MaxBytes)
	}
	if sum > u.Total-uint64(reserve) {
		warn("spool.lanes", "together with the lane system they may keep %s, and the file system of %s has %s, less a reserve of %s: "+
			"on a full disk each does what its when_full says before it has max_bytes", sizeText(sum), dir, sizeText(u.Total), sizeText(uint64(reserve)))
	}
	return found
}

// sizeText is for people: 1.5 GiB.
func sizeText(n uint64) string {
	if n >= 10<<30 {
		return fmt.Sprintf("%d GiB", n>>30)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}
