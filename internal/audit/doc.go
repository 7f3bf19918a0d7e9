// Package audit keeps a record of who did what to a gateway, in a form in which a later change shows.
//
// The file audit.log holds a line of JSON for each act. Each line ends with the SHA-256 of all that stands before it in
// the line, and among that is the hash of the line before:
//
//	{"v":1,"seq":7,"at":"2026-03-01T06:00:00.123Z","who":"ops",…,"prev":"<hash of 6>","hash":"<of all before ,"hash">"}
//
// So whoever changes, removes or swaps a line has to make every hash after it anew, and who noted one of those elsewhere sees
// it. The hashes have no key: they hold against mistakes and against hands in the file, not against somebody who may write
// it and nobody has noted anything.
//
// A file that is full is renamed to audit-<seq of its first line>.log, and the chain goes on in the next one.
package audit
