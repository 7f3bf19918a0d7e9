package devices_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/devices"
	"holdfast/internal/kv"
)

// FuzzDeviceRow: any bytes are a device, a newer version or damage; and what is a device stays what it is when it is
// written again.
func FuzzDeviceRow(f *testing.F) {
	for _, seed := range deviceRows(f) {
		f.Add(seed)
	}
	f.Add([]byte{2})
	f.Add([]byte{1, 0xa1, 0x07, 0x9a, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, row []byte) {
		shown, again, err := devices.DecodeDeviceRow(row)
		if err != nil {
			return
		}
		twice, _, err := devices.DecodeDeviceRow(again)
		if err != nil {
			t.Fatalf("%x does not survive being written again: %v", row, err)
		}
		if diff := cmp.Diff(shown, twice); diff != "" {
			t.Fatal(diff)
		}
		devices.DecodePresenceRow(row)
		devices.DecodeCountsRow(row)
	})
}

func FuzzPresenceRow(f *testing.F) {
	f.Add([]byte{1, 0xa0})
	f.Add([]byte{1, 0xa2, 0x01, 0xf5, 0x04, 0x61, 0x61})
	f.Fuzz(func(t *testing.T, row []byte) {
		devices.DecodeCountsRow(row)
		p, again, err := devices.DecodePresenceRow(row)
		if err != nil {
			return
		}
		if q, _, err := devices.DecodePresenceRow(again); err != nil || p != q {
			t.Fatalf("%+v was written and read as %+v, %v", p, q, err)
		}
	})
}

// deviceRows returns rows of devices as the registry writes them.
func deviceRows(t testing.TB) (rows [][]byte) {
	s := newSite(t)
	s.add(devices.NewDevice{ID: "a", Name: "A", Labels: map[string]string{"k": "v", "l": ""}})
	s.add(devices.NewDevice{ID: "b", Disabled: true, NoCredential: true})
	s.add(withPassword("c"))
	s.add(devices.NewDevice{ID: "d", Credential: pinOf(certificate("d", nil))})
	if _, _, err := s.AddCredential(t.Context(), "d", devices.NewCredential{RetireOthers: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if err := s.store.Scan([]byte{kv.PrefixDevice, 1}, func(_, row []byte) error {
		rows = append(rows, bytes.Clone(row))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return rows
}

// TestRowsAreSmall keeps what a device costs on disk and in the cache in view.
func TestRowsAreSmall(t *testing.T) {
	for _, row := range deviceRows(t) {
		if len(row) > 200 {
			t.Errorf("%d bytes: %x", len(row), row)
		}
	}
}

// TestRowLayoutIsFrozen: bytes that a released version wrote are read as they were meant.
func TestRowLayoutIsFrozen(t *testing.T) {
	row := []byte("\x01\xa7\x01\x61N\x02\xa1\x61k\x61v\x03\x01\x04\x66device\x05\x1b\x00\x00\x01\x9a\xbc\xde\xf0\x12\x06\x1b\x00\x00\x01\x9a\xbc\xde\xf0\x13\x07\x81" +
		"\xa8\x01\x62id\x02\x02\x03\x1b\x00\x00\x01\x9a\xbc\xde\xf0\x14\x05\x58\x2001234567890123456789012345678901\x06\x44salt\x07\x02\x08\x19\x4c\x00\x09\x01")
	got, again, err := devices.DecodeDeviceRow(row)
	if err != nil {
		t.Fatal(err)
	}
	want := devices.Device{
		ID: "id", Name: "N", Labels: map[string]string{"k": "v"}, Role: "device",
		Created: time.UnixMilli(0x19abcdef012).UTC(), Updated: time.UnixMilli(0x19abcdef013).UTC(),
		Credentials: []devices.Credential{{ID: "id", Kind: devices.CredentialPassword, Created: time.UnixMilli(0x19abcdef014).UTC()}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if !bytes.Equal(row, again) {
		t.Errorf("written again it is\n%x, was\n%x", again, row)
	}
	presence := []byte("\x01\xa9\x01\xf5\x02\x01\x03\x02\x04\x61a\x05\x61p\x06\x61l\x07\xf5\x08\x61w\x09\x61r")
	p, again, err := devices.DecodePresenceRow(presence)
	if err != nil || p != (devices.Presence{
		Connected: true, Since: time.UnixMilli(1).UTC(), LastSeen: time.UnixMilli(2).UTC(), Address: "a", Protocol: "p",
		Listener: "l", TLS: true, Will: "w", Reason: "r",
	}) || !bytes.Equal(presence, again) {
		t.Errorf("%+v, %x, %v", p, again, err)
	}
	counts := []byte("\x01\xa4\x01\x04\x02\x03\x03\x02\x04\x01")
	if c, again, err := devices.DecodeCountsRow(counts); err != nil || !bytes.Equal(counts, again) {
		t.Errorf("%+v, %x, %v", c, again, err)
	}
}
