package kv

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// errLookCopy says that a store which is only looked at is damaged, so that its copy has to be opened.
var errLookCopy = errors.New("store is damaged")

// copySuffix is of the folder in which a tool mends a copy of a damaged store. What an earlier tool left there is removed.
const copySuffix = ".copy"

func (s *Store) looksOnly() bool { return s.opt.Look && s.copied == "" }

// openCopy copies the store's files beside it, tables as links where the file system has them, and opens that.
func (s *Store) openCopy(dir string) (*pebble.DB, error) {
	fs, to := s.opt.FS, dir+copySuffix
	if err := fs.RemoveAll(to); err != nil {
		return nil, err
	}
	s.copied = to
	db, err := s.copyAndOpen(dir, to)
	if err != nil {
		return nil, errors.Join(err, s.removeCopy())
	}
	return db, nil
}

func (s *Store) copyAndOpen(dir, to string) (*pebble.DB, error) {
	fs := s.opt.FS
	names, err := fs.List(dir)
	if err != nil {
		return nil, err
	}
	if err := fs.MkdirAll(to, 0o700); err != nil {
		return nil, fmt.Errorf("copy damaged store to look at it: %w", err)
	}
	for _, name := range names {
		from, path := fs.PathJoin(dir, name), fs.PathJoin(to, name)
		if name == "LOCK" {
			continue
		}
		err := error(nil)
		if strings.HasSuffix(name, ".sst") {
			err = vfs.LinkOrCopy(fs, from, path)
		} else {
			err = vfs.Copy(fs, from, path)
		}
		if err != nil {
			return nil, fmt.Errorf("copy damaged store to look at it: %w", err)
		}
	}
	return s.openWhole(to)
}

// removeCopy is part of Close.
func (s *Store) removeCopy() error {
	if s.copied == "" {
		return nil
	}
	return s.opt.FS.RemoveAll(s.copied)
}
