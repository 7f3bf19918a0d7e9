package gateway_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/gateway"
	"holdfast/gateway/httpapi"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
)

// restoreOf stops a gateway with a row of a QoS 2 publish that was received and not released, backs it up, and gives the
// configuration for a start from the backup.
func restoreOf(t *testing.T) (dir string, info httpapi.Backup, qos2 []byte) {
	t.Helper()
	c := configuration(t, filepath.Join(t.TempDir(), "data"))
	start(t, c).end()
	qos2 = append([]byte{kv.PrefixQoS2, 0, 4}, "dev1\x00\x00\x00\x00\x00\x00\x00\x01\x00\x07"...)
	store, err := kv.Open(filepath.Join(c.Gateway.DataDir, "store"), kv.Options{Log: testkit.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(store.ApplyWait([]kv.Op{{Key: qos2, Value: []byte{1}}}), store.Close()); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "backup")
	info, err = gateway.Backup(c.Gateway.DataDir, dir, "test", testkit.Logger(t))
	if err != nil {
		t.Fatal(err)
	}
	return dir, info, qos2
}

func TestABackupSaysWhatIsInIt(t *testing.T) {
	dir, info, _ := restoreOf(t)
	if info.Gateway != "gw1" || info.Epoch == "" || len(info.Lanes) < 2 || len(info.Files) < 3 || info.Version != 1 {
		t.Errorf("%+v", info)
	}
	var sum int64
	for _, f := range info.Files {
		fi, err := os.Stat(filepath.Join(dir, f.Name))
		if err != nil || fi.Size() != f.Size {
			t.Errorf("%+v: %v", f, err)
		}
		sum += f.Size
	}
	if sum != info.Bytes {
		t.Errorf("%d bytes, said are %d", sum, info.Bytes)
	}
	var read httpapi.Backup
	b, err := os.ReadFile(filepath.Join(dir, "backup.json"))
	if err == nil {
		err = json.Unmarshal(b, &read)
	}
	if err != nil || read.ID != info.ID {
		t.Errorf("%v: %+v", err, read)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if _, err := gateway.Backup(filepath.Join(t.TempDir(), "none"), dir+"2", "test", testkit.Logger(t)); err == nil {
		t.Error("a backup of nothing")
	}
	if _, err := os.Stat(dir + "2"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it left something: %v", err)
	}
}

// TestTheFirstStartOfABackupBeginsAnEpoch: once, whatever is wrong with the mark. The packet ids of QoS 2 that it has are no
// longer those of the devices.
func TestTheFirstStartOfABackupBeginsAnEpoch(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, mark string){
		"whole":   func(*testing.T, string) {},
		"damaged": func(t *testing.T, mark string) { write(t, mark, `{"version":`) },
		"emptied": func(t *testing.T, mark string) { write(t, mark, "") },
	} {
		t.Run(name, func(t *testing.T) {
			dir, info, qos2 := restoreOf(t)
			mark := filepath.Join(dir, "backup.json")
			spoil(t, mark)
			// Looking changes nothing.
			sp, closeAll, err := gateway.OpenSpool(dir, testkit.Logger(t))
			if err != nil {
				t.Fatal(err)
			}
			if sp.Epoch() != info.Epoch {
				t.Error("a tool that looks began an epoch")
			}
			if err := closeAll(); err != nil {
				t.Fatal(err)
			}
			// A command that changes something does not go on under the epoch of the backup, and leaves the rest to the start.
			sp, closeAll, err = gateway.OpenSpoolToChange(dir, "gw1", testkit.Logger(t))
			if err != nil {
				t.Fatal(err)
			}
			changed := sp.Epoch()
			if err := closeAll(); err != nil {
				t.Fatal(err)
			}
			if changed == info.Epoch {
				t.Error("a command that changes something used the epoch of the backup")
			}

			g := start(t, configuration(t, dir))
			first := g.status().Epoch
			g.end()
			if first != changed {
				t.Errorf("epoch %s after the start, %s before it", first, changed)
			}
			if _, err := os.Stat(mark); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the mark stays: %v", err)
			}
			store, err := kv.Open(filepath.Join(dir, "store"), kv.Options{Log: testkit.Logger(t)})
			if err != nil {
				t.Fatal(err)
			}
			_, found, err := store.Get(qos2)
			if err := errors.Join(err, store.Close()); err != nil || found {
				t.Errorf("a packet id of before: %v, %v", found, err)
			}
			g = start(t, configuration(t, dir))
			if g.status().Epoch != first {
				t.Error("another epoch at the second start")
			}
			g.end()
		})
	}
}

func TestABackupOfANewerVersionIsRefused(t *testing.T) {
	dir, _, _ := restoreOf(t)
	write(t, filepath.Join(dir, "backup.json"), `{"version":2,"id":"x","holdfast":"9.0"}`)
	_, err := gateway.New(t.Context(), gateway.Options{Config: configuration(t, dir), Log: testkit.Logger(t)})
	if err == nil || !strings.Contains(err.Error(), "made by a newer holdfast (9.0)") {
		t.Errorf("New = %v", err)
	}
}

func TestALeftOverOfABackupGoesWithTheNextStart(t *testing.T) {
	c := configuration(t, t.TempDir())
	left := filepath.Join(c.Gateway.DataDir, "backup.tmp", "store")
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(left, "000001.log"), "x")
	g := start(t, c)
	if _, err := os.Stat(filepath.Dir(left)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	// One at a time, and what is kept for nobody goes with the next.
	one, err := g.Backup()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Backup(); !errors.Is(err, httpapi.ErrBackupRuns) {
		t.Errorf("a second backup: %v", err)
	}
	if err := one.Close(true); err != nil {
		t.Fatal(err)
	}
	two, err := g.Backup()
	if err != nil || two.Info.ID == one.Info.ID {
		t.Fatalf("%+v, %v", two, err)
	}
	if err := two.Close(false); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(two.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
