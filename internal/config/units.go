package config

import (
	"errors"
	"math/big"
	"strconv"
	"strings"
	"time"
)

// Sizes are written with a binary unit. MB and its like are refused: half the world means 10^6 by
// it and the other half 2^20, and a disk that fills up is a bad place to find out which.
var sizeUnits = []struct {
	name string
	size int64
}{
	{"TiB", 1 << 40},
	{"GiB", 1 << 30},
	{"MiB", 1 << 20},
	{"KiB", 1 << 10},
	{"B", 1},
}

var durationUnits = []struct {
	name string
	size time.Duration
}{
	{"d", 24 * time.Hour},
	{"h", time.Hour},
	{"m", time.Minute},
	{"s", time.Second},
	{"ms", time.Millisecond},
	{"us", time.Microsecond},
}

const (
	sizeForms     = "write a size with its unit: 64KiB, 512MiB, 8GiB"
	durationForms = "write a duration with its unit: 100ms, 30s, 5m, 72h, 7d"
)

var (
	errSize     = errors.New(sizeForms)
	errDuration = errors.New(durationForms)
)

// ParseSize reads a size as the configuration has it: 512MiB, 1.5GiB, 100B or 0.
func ParseSize(s string) (int64, error) { return parseSize(s) }

// FormatSize writes one in the largest unit that needs no fraction.
func FormatSize(n int64) string { return formatSize(n) }

// parseSize reads 512MiB, 1.5GiB, 100B or 0.
func parseSize(s string) (int64, error) {
	if s == "0" {
		return 0, nil
	}
	number, unit := splitUnit(s)
	for _, u := range sizeUnits {
		if unit == u.name {
			n, ok := scale(number, u.size)
			if !ok {
				return 0, errSize
			}
			return n, nil
		}
	}
	switch strings.ToLower(unit) {
	case "":
		return 0, errors.New("has no unit: " + sizeForms)
	case "k", "kb", "m", "mb", "g", "gb", "t", "tb", "kib", "mib", "gib", "tib":
		return 0, errors.New("unit " + strconv.Quote(unit) + " is not taken, it is " + strings.ToUpper(unit[:1]) +
			"iB here: " + sizeForms)
	}
	return 0, errSize
}

// ParseDuration reads a duration as the file has it: 100ms, 1h30m, 7d or 0.
func ParseDuration(s string) (time.Duration, error) { return parseDuration(s) }

// parseDuration reads 100ms, 1h30m, 7d or 0. Units come from large to small, each once.
func parseDuration(s string) (time.Duration, error) {
	if s == "0" {
		return 0, nil
	}
	var total time.Duration
	next := 0
	for rest := s; rest != ""; {
		number, tail := splitUnit(rest)
		end := strings.IndexFunc(tail, func(r rune) bool { return r >= '0' && r <= '9' })
		if end < 0 {
			end = len(tail)
		}
		unit := tail[:end]
		rest = tail[end:]
		if unit == "" {
			return 0, errors.New("has no unit: " + durationForms)
		}
		found := false
		for i := next; i < len(durationUnits) && !found; i++ {
			u := durationUnits[i]
			if unit != u.name {
				continue
			}
			found, next = true, i+1
			n, ok := scale(number, int64(u.size))
			if !ok || n%int64(time.Microsecond) != 0 || time.Duration(n) > maxDuration-total {
				return 0, errDuration
			}
			total += time.Duration(n)
		}
		if !found {
			return 0, errDuration
		}
	}
	if s == "" {
		return 0, errDuration
	}
	return total, nil
}

// maxDuration keeps sums of a duration and a time far from overflow: 100 years.
const maxDuration = 100 * 365 * 24 * time.Hour

func splitUnit(s string) (number, rest string) {
	i := 0
	for i < len(s) && (s[i] >= '0' && s[i] <= '9' || s[i] == '.') {
		i++
	}
	return s[:i], strings.TrimPrefix(s[i:], " ")
}

// scale gives number x unit if that is a whole number that fits in 62 bits.
func scale(number string, unit int64) (int64, bool) {
	if number == "" || number[0] == '.' || number[len(number)-1] == '.' || len(number) > 32 {
		return 0, false
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, false
	}
	r.Mul(r, new(big.Rat).SetInt64(unit))
	if !r.IsInt() || r.Num().BitLen() > 62 {
		return 0, false
	}
	return r.Num().Int64(), true
}

// formatSize writes what parseSize reads.
func formatSize(n int64) string {
	for _, u := range sizeUnits {
		if n > 0 && n%u.size == 0 {
			return strconv.FormatInt(n/u.size, 10) + u.name
		}
	}
	return "0"
}

// FormatDuration writes what ParseDuration reads: 1h30m, 168h.
func FormatDuration(d time.Duration) string { return formatDuration(d) }

// formatDuration writes what parseDuration reads; days are left to those who write by hand.
func formatDuration(d time.Duration) string {
	if d < time.Microsecond {
		return "0"
	}
	var b strings.Builder
	for _, u := range durationUnits[1:] {
		if n := d / u.size; n > 0 {
			b.WriteString(strconv.FormatInt(int64(n), 10))
			b.WriteString(u.name)
			d -= n * u.size
		}
	}
	return b.String()
}
